"""What a rank's DistributedOptimizer holds: main weights and moments by model parameter, and the count of steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

MAIN = "param"  # the name of the main weight beside the moments' names
COPY = "master_param"  # that of an fp32 main weight's copy on the CPU, where the optimizer updates it there


@dataclass(frozen=True)
class Owned:
    """The flat range [start, stop) of a model parameter whose optimizer state this rank holds."""

    member: DistributedOptimizer
    param: torch.nn.Parameter
    start: int
    stop: int

    @property
    def group(self) -> dict[str, Any]:
        """The settings that its update takes: lr, betas, weight_decay, ..."""
        return self.member.optimizer.param_groups[self.member.model_param_group_index_map[self.param][0]]

    @property
    def main(self) -> Tensor:
        """[stop - start]: the main weight, fp32; a copy where the optimizer keeps it in another dtype."""
        group, place = self.member.model_param_group_index_map[self.param]
        inner = self.member.optimizer
        held = inner.param_groups[group]["params"][place]
        if not self.member.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
            return held
        if isinstance(inner, HybridDeviceOptimizer):
            return inner.state[held]["master_param"]
        return inner.get_unscaled_state(held, "master_param")

    @property
    def gradient(self) -> Tensor | None:
        """fp32 [stop - start]: the reduced gradient that the optimizer will read; None before it is there."""
        group, place = self.member.model_param_group_index_map[self.param]
        main = self.member.optimizer.param_groups[group]["params"][place]
        decoupled = getattr(main, "decoupled_grad", None)
        return main.grad if decoupled is None else decoupled

    def states(self) -> dict[str, Tensor]:
        """Flat [stop - start]: the main weight (MAIN) and, when the optimizer has them, its moments by its names for them.

        The tensors themselves, or fp32 copies where the optimizer keeps other dtypes.
        """
        return {
            name: state
            for name, state in self._all().items()
            if isinstance(state, Tensor) and state.shape == (self.stop - self.start,) and name != COPY
        }

    @torch.no_grad()
    def put(self, states: dict[str, Tensor]) -> None:
        """Replace what `states` returned."""
        own = self._all()
        if COPY in own and MAIN in states:
            states = {**states, COPY: states[MAIN]}
        self.member._set_main_param_and_optimizer_states(
            self.param, {**own, **{k: v.to(own[k].device) for k, v in states.items()}}
        )

    def _all(self) -> dict[str, Any]:
        return self.member._get_main_param_and_optimizer_states(self.param)


def members(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The optimizers that are chained in `optimizer`; without those of ranks, or models, that have nothing to train."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [member for member in chained if not member.is_stub_optimizer]


def owned(optimizer: MegatronOptimizer) -> Iterator[Owned]:
    """All that this rank holds state of, in the order of the gradient buffers."""
    for member in members(optimizer):
        for param in member.model_param_gbuf_map:
            found = member._get_model_param_range_map(param)["param"]
            yield Owned(member, param, found.start, found.end)


def gradients(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """The gradients that the optimizer will read, this rank's ranges of them."""
    for member in members(optimizer):
        for param in member.get_parameters():
            decoupled = getattr(param, "decoupled_grad", None)
            gradient = param.grad if decoupled is None else decoupled
            if gradient is not None:
                yield gradient


def owned_gradients(optimizer: MegatronOptimizer) -> Iterator[tuple[Owned, Tensor]]:
    """All that this rank holds state of, with its gradient."""
    for part in owned(optimizer):
        gradient = part.gradient
        if gradient is not None:
            yield part, gradient


def choose_adam_kernel(optimizer: MegatronOptimizer, fused: bool) -> None:
    """Let torch's Adam, where megatron took that, update a tensor in one pass instead of a dozen; or let torch choose."""
    for member in members(optimizer):
        if isinstance(member.optimizer, torch.optim.Adam | torch.optim.AdamW):
            for group in member.optimizer.param_groups:
                group["fused"] = fused or None


def make_moments(optimizer: MegatronOptimizer) -> None:
    """Moments of zeros for an optimizer that has taken no step; main weights and the count of steps stay as they are."""
    for member in members(optimizer):
        inner = member.optimizer
        if isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
            _make_adam_moments(inner)
        elif isinstance(inner, HybridDeviceOptimizer) or member.config.use_precision_aware_optimizer:
            _step_over(member)
        else:
            member.init_state_fn(inner)
    set_steps(optimizer, 0)


def _make_adam_moments(inner: torch.optim.Optimizer) -> None:
    """As torch's Adam makes them in its first step."""
    for group in inner.param_groups:
        for param in group["params"]:
            where = param.device if group["fused"] or group["capturable"] else "cpu"
            inner.state[param] = {
                "step": torch.zeros((), dtype=torch.float32, device=where),
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }


def _step_over(member: DistributedOptimizer) -> None:
    """A first step without gradient, update and weight decay. The optimizer on two devices writes all weights in it."""
    rates = [group["lr"] for group in member.optimizer.param_groups]
    for group in member.optimizer.param_groups:
        group["lr"] = 0.0
    member._init_optimizer_states_with_dummy_values()
    for group, rate in zip(member.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def loaded(optimizer: MegatronOptimizer) -> None:
    """Main weights and moments have been replaced."""
    for member in members(optimizer):
        hybrid = member.optimizer
        if isinstance(hybrid, HybridDeviceOptimizer):
            # It looks every weight up among those that have an fp32 copy, where main weights in fp32 have none.
            kept, hybrid.param_to_fp32_param = hybrid.param_to_fp32_param, hybrid.param_to_inner_param
            try:
                hybrid._sync_hdo_state_to_sub_optimizers()
            finally:
                hybrid.param_to_fp32_param = kept


def steps(optimizer: MegatronOptimizer) -> int:
    """Steps that the optimizer has taken on this rank; 0 where it has nothing to update."""
    counts = [int(g["step"]) for part in parts(optimizer) for g in part.param_groups if "step" in g]
    counts += [int(s["step"]) for part in parts(optimizer) for s in part.state.values() if "step" in s]
    return max(counts, default=0)


def set_steps(optimizer: MegatronOptimizer, count: int) -> None:
    """Let the optimizer have taken `count` steps."""
    for part in parts(optimizer):
        if not isinstance(part, torch.optim.Adam | torch.optim.AdamW):
            for group in part.param_groups:
                group["step"] = count  # Apex and Transformer Engine count per group, in whole numbers
        for state in part.state.values():
            if "step" in state:  # torch's AdamW counts per parameter
                state["step"] = torch.full_like(state["step"], count)


def parts(optimizer: MegatronOptimizer) -> Iterator[torch.optim.Optimizer]:
    """The optimizers that update: where some of it happens on the CPU, those of both devices."""
    for member in members(optimizer):
        yield from getattr(member.optimizer, "sub_optimizers", [member.optimizer])


def state_bytes(optimizer: MegatronOptimizer) -> int:
    """Bytes of main weights and moments that this rank's optimizer holds (scalars such as `step` left out).

    A main weight that is a view of the model's own fp32 weight is counted as well: Adam works on it.
    """
    return sum(state.nbytes for part in owned(optimizer) for state in part.states().values())
