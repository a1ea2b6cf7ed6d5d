"""megatron-core's other optimizers on a CPU: stand-ins for a GPU to offload from, and for Transformer Engine's Adam."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from megatron.core import optimizer
from megatron.core.optimizer import distrib_optimizer, optimizer_config
from torch import Tensor

from tests.dist import resume_work

AWARE = {"use_precision_aware_optimizer": True}
KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "offloaded": {**AWARE, "optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0},
    "half offloaded": {**AWARE, "optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5},
    "precision-aware": AWARE,
    "precision-aware, fp16 main weights": {
        **AWARE,
        "main_params_dtype": torch.float16,
        "exp_avg_dtype": torch.bfloat16,
    },
}


class FusedAdam(torch.optim.Optimizer):
    """What Transformer Engine's AdamW promises, in torch: it reads `decoupled_grad` and keeps the main weights."""

    def __init__(
        self,
        params: Any,
        *,
        adam_w_mode: bool,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        master_weights: bool = False,
        store_param_remainders: bool = False,
        **defaults: Any,
    ) -> None:
        super().__init__(params, defaults)
        assert adam_w_mode and use_decoupled_grad and master_weights and not store_param_remainders
        self._dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype, "master_param": master_weight_dtype}

    def initialize_state(self, param: Any, store_param_remainders: bool = False) -> None:
        for name, dtype in self._dtypes.items():
            value = param.detach() if name == "master_param" else torch.zeros_like(param)
            self.state[param][name] = value.to(dtype, copy=True)

    def get_unscaled_state(self, param: Any, name: str) -> Tensor:
        return self.state[param][name].float()

    def set_scaled_state(self, param: Any, name: str, value: Tensor) -> None:
        assert value.dtype == torch.float32
        self.state[param][name].copy_(value)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), step = group["betas"], group["step"]
            for param in group["params"]:
                if not self.state[param]:
                    self.initialize_state(param)
                gradient = getattr(param, "decoupled_grad", None)
                if gradient is None:
                    continue
                main, mean, square = (
                    self.get_unscaled_state(param, k) for k in ("master_param", "exp_avg", "exp_avg_sq")
                )
                mean.lerp_(gradient, 1 - beta1)
                square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                main.mul_(1 - group["lr"] * group["weight_decay"])
                spread = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
                main.addcdiv_(mean / (1 - beta1**step), spread, value=-group["lr"])
                for name, value in (("master_param", main), ("exp_avg", mean), ("exp_avg_sq", square)):
                    self.set_scaled_state(param, name, value)
                param.copy_(self.get_unscaled_state(param, "master_param"))


@contextmanager
def transformer_engine_adam() -> Iterator[None]:
    """megatron-core takes FusedAdam for Transformer Engine's."""
    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers")
    modules = {name: ModuleType(name) for name in names}
    modules[names[-1]].FusedAdam = FusedAdam  # type: ignore[attr-defined]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(sys.modules, modules))
        for module in (optimizer, optimizer_config):
            stack.enter_context(mock.patch.object(module, "is_te_min_version", lambda *a, **k: True))
        for module in (optimizer, distrib_optimizer):
            stack.enter_context(mock.patch.object(module, "Adam", FusedAdam))
        stack.enter_context(mock.patch.object(optimizer, "USING_PYTORCH_OPTIMIZER", False))
        stack.enter_context(mock.patch.object(distrib_optimizer, "HAVE_APEX_OR_TE", True))
        stack.enter_context(mock.patch.object(distrib_optimizer, "USING_TE_OPTIMIZER", True))
        yield


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """For megatron's optimizer on two devices, tensors are on a GPU but for those that it pins on the host."""

    def is_cuda(self: Tensor) -> bool:
        return sys._getframe(1).f_globals["__name__"].endswith("hybrid_optimizer") and not hasattr(self, "pinned_here")

    def pin(self: Tensor, *args: Any) -> Tensor:
        copy = self.clone()
        copy.pinned_here = True  # type: ignore[attr-defined]
        return copy

    def carried(method: Any) -> Any:
        """A pinned tensor's copies are on the host too."""

        def run(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            copy = method(self, *args, **kwargs)
            if hasattr(self, "pinned_here"):
                copy.pinned_here = True
            return copy

        return run

    empty = torch.empty

    def unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        return empty(*args, **kwargs)

    with (
        mock.patch.object(optimizer_config, "is_te_min_version", lambda *a, **k: True),
        mock.patch.object(torch.Tensor, "is_cuda", property(is_cuda), create=True),
        mock.patch.object(torch.Tensor, "pin_memory", pin),
        mock.patch.multiple(
            torch.Tensor, **{n: carried(getattr(torch.Tensor, n)) for n in ("detach", "clone", "float")}
        ),
        mock.patch.object(torch, "empty", unpinned),
        mock.patch.object(torch.cuda, "current_stream", lambda *_: mock.MagicMock()),
        mock.patch.object(torch.cuda, "Stream", mock.MagicMock),
    ):
        yield


def train(run: Any, shield: str, kind: str) -> dict[str, Any]:
    """`resume_work.train_run` with the optimizer of `kind`."""
    run.train.optimizer.update(KINDS[kind])
    where = pretended_gpu() if "offload" in kind else transformer_engine_adam() if kind != "adamw" else ExitStack()
    with where:
        found = resume_work.train_run(run, shield)
    return {"history": found["history"], "stopped": found["stopped"]}
