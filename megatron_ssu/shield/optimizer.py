"""megatron's distributed optimizer over trainable elements only.

A data-parallel rank owns a flat range of every parameter's gradient buffer. For a shielded parameter this optimizer keeps of
that range only the trainable elements: fp32 main weight, gradient, exp_avg and exp_avg_sq are compact 1-D tensors in
ascending order. Gradient norm, clipping, weight decay and Adam are megatron's and torch's own; they cannot touch a frozen
element, because it is not there. Checkpoints keep megatron's fully reshardable format: shards are expanded when they are
saved (frozen moments are zero) and compacted when they are loaded, by every data-parallel rank for what it owns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer

from megatron_ssu.engine.optimizer_class import distributed_optimizer_class
from megatron_ssu.errors import UserError
from megatron_ssu.shield.local import LocalShield
from megatron_ssu.shield.shards import ShardMask
from megatron_ssu.shield.stored import Box, boxes, stored_weights

STATES = ("param", "exp_avg", "exp_avg_sq")  # stored for every parameter


class ShieldedDistributedOptimizer(DistributedOptimizer):
    """See the module docstring. `shield` tells the trainable elements; without frozen ones all is as in megatron.

    `fused_adam` lets torch's Adam, where megatron took that, update a tensor in one pass instead of a dozen.
    """

    def __init__(self, *args: Any, shield: LocalShield, fused_adam: bool = False, **kwargs: Any) -> None:
        self.shield, self.fused_adam = shield, fused_adam
        self.masks: dict[torch.nn.Parameter, ShardMask] = {}  # model parameter -> trainable elements of its owned range
        super().__init__(*args, **kwargs)
        self._choose_kernel()

    def _choose_kernel(self) -> None:
        if not self.is_stub_optimizer and isinstance(self.optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            for group in self.optimizer.param_groups:
                group["fused"] = self.fused_adam or None  # None: torch chooses

    def _build_model_and_main_param_groups(  # type: ignore[override]
        self, gbuf_ranges: list, param_gbuf_map: dict, opt_group_ranges: list, config: OptimizerConfig
    ) -> tuple:
        groups = super()._build_model_and_main_param_groups(gbuf_ranges, param_gbuf_map, opt_group_ranges, config)
        model16, model32, _, main32, main16 = groups
        for index, group_range in enumerate(opt_group_ranges):
            for models, mains in ((model16[index], main16[index]), (model32[index], main32[index])):
                for i, model_param in enumerate(models):
                    mains[i] = self._compact_main(model_param, mains[i])
            group_range["orig_group"]["params"] = [*main32[index], *main16[index]]
        return groups

    def _compact_main(self, model_param: torch.nn.Parameter, main: torch.Tensor) -> torch.Tensor:
        owned = self._owned(model_param)
        mask = self.shield.mask(model_param, owned.start, owned.end)
        if mask is None:
            return main
        self.masks[model_param] = mask
        compact = torch.empty(mask.numel, dtype=torch.float32, device=main.device)
        mask.gather(main.detach(), compact)
        tensor_parallel.copy_tensor_model_parallel_attributes(compact, model_param)
        if hasattr(model_param, "shared"):
            compact.shared = model_param.shared  # type: ignore[attr-defined]
        if hasattr(model_param, "main_param"):
            model_param.main_param = compact
        return compact

    def _owned(self, model_param: torch.nn.Parameter) -> Any:
        """This data-parallel rank's flat range of a parameter; works while the superclass is still being set up."""
        return self._get_model_param_range_map(model_param)["param"]

    def pairs(self) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Model parameters and their main shards."""
        pairs = []
        for models, mains in (
            (self.model_float16_groups, self.shard_fp32_from_float16_groups),
            (self.model_fp32_groups, self.shard_fp32_groups),
        ):
            for model_group, main_group in zip(models, mains, strict=True):
                pairs += list(zip(model_group, main_group, strict=True))
        return pairs

    def _copy_model_grads_to_main_grads(self) -> None:
        if self.is_stub_optimizer:
            return
        for model_param, main in self.pairs():
            if HAVE_APEX_OR_TE and main.numel() == 0:
                # Their multi-tensor kernels may skip what comes before an empty tensor, or return no norm for empty ones.
                main.grad = None
                continue
            owned = self._owned(model_param)
            grad = model_param.main_grad.view(-1)[owned.start : owned.end]  # type: ignore[attr-defined]
            mask = self.masks.get(model_param)
            if mask is None:
                main.grad = grad.float()
            else:
                compact = torch.empty_like(main)
                mask.gather(grad, compact)
                main.grad = compact

    def _collect_main_grad_data_for_unscaling(self) -> list[torch.Tensor]:
        grads = (main.grad for _, main in self.pairs())
        return [grad.data for grad in grads if grad is not None]

    def _copy_main_params_to_model_params(self) -> None:
        if self.is_stub_optimizer:
            return
        for model_param, main in self.pairs():
            shard = self._buffer_shard(model_param)
            mask = self.masks.get(model_param)
            if mask is None:
                shard.data.copy_(main)
            else:
                mask.scatter(main.detach(), shard)

    def _buffer_shard(self, model_param: torch.nn.Parameter) -> torch.Tensor:
        """The owned range of a parameter in the buffer that the parameter all-gather sends."""
        world = self._get_model_param_range_map(model_param)["gbuf_world_in_bucket"]
        index, _, bucket = self.model_param_gbuf_map[model_param]
        return self.buffers[index].buckets[bucket].param_data.view(-1)[world.start : world.end]

    def _copy_model_params_to_main_params(self, state_dict: Any = None) -> None:
        if state_dict is not None:
            raise RuntimeError("main weights are taken from the model's own weights only")
        for model_param, main in self.pairs():
            owned = self._owned(model_param)
            shard = model_param.detach().view(-1)[owned.start : owned.end]
            mask = self.masks.get(model_param)
            if mask is None:
                main.data.copy_(shard)
            else:
                mask.gather(shard, main.data)

    @torch.no_grad()
    def sharded_param_state_fully_reshardable(
        self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: dict | None = None
    ) -> dict[str, Any]:
        """The owned ranges' main weights and moments as boxes of the stored tensors, frozen places filled up.

        For a save: copies on the CPU, made one parameter at a time. For a load: room on the CPU for shielded parameters;
        the others are loaded in place.
        """
        stored = stored_weights(model_sharded_state_dict)
        found = {}
        for number, (model_param, main) in enumerate(self.pairs()):
            if not is_loading and (any(stored[model_param].replica_id[:2]) or self.distributed_optimizer_instance_id):
                continue  # ranks of another tensor, pipeline or optimizer instance hold it too: the first stores it
            owned = self._owned(model_param)
            parts = boxes(stored[model_param], owned.start, owned.end)
            place = self._room if is_loading else self._filled_up
            found[str(number)] = {
                name: {
                    str(i): box.sharded(name, data)
                    for i, (box, data) in enumerate(zip(parts, place(model_param, main, name, parts), strict=True))
                }
                for name in STATES
            }
        return found

    def _filled_up(
        self, model_param: torch.nn.Parameter, main: torch.Tensor, name: str, parts: list[Box]
    ) -> Iterator[torch.Tensor]:
        """Copies on the CPU of the boxes' elements of one state."""
        owned, mask, flat = self._owned(model_param), self.masks.get(model_param), self._state(main, name)
        if mask is not None and name == "param":
            values, flat = flat, model_param.detach().view(-1)[owned.start : owned.end].float().clone()
            mask.scatter(values, flat)
        elif mask is not None:
            flat = mask.expand(flat)
        for box in parts:
            yield flat[box.start - owned.start : box.stop - owned.start].to("cpu", copy=True)

    def _room(
        self, model_param: torch.nn.Parameter, main: torch.Tensor, name: str, parts: list[Box]
    ) -> Iterator[torch.Tensor]:
        """Where the boxes' elements of one state are loaded to."""
        owned, flat = self._owned(model_param), self._state(main, name)
        for box in parts:
            if model_param in self.masks:
                yield torch.empty(box.stop - box.start)
            else:
                yield flat[box.start - owned.start : box.stop - owned.start]

    def _state(self, main: torch.Tensor, name: str) -> torch.Tensor:
        if name == "param":
            return main.detach()
        if main.numel() == 0:  # Adam of Transformer Engine and Apex may keep nothing for it
            return torch.empty_like(main)
        return self.optimizer.state[main][name]

    @torch.no_grad()
    def load_parameter_state_from_fully_reshardable(self, state_dict: dict[str, Any]) -> None:
        """Take over what was loaded into `sharded_param_state_fully_reshardable`; `state_dict` is emptied."""
        for number, (model_param, main) in enumerate(self.pairs()):
            loaded, mask = state_dict.pop(str(number)), self.masks.get(model_param)
            for name in STATES:
                parts = loaded.pop(name)
                flat = torch.cat([parts[str(i)].reshape(-1) for i in range(len(parts))])
                target = self._state(main, name)
                if mask is None:
                    target.copy_(flat)
                else:
                    mask.gather(flat.to(target.device), target)

    def _init_optimizer_states_with_dummy_values(self) -> None:
        """Make moments of zeros, as before the first step; main weights and the count of steps stay as they are."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0  # neither update nor weight decay
        self._dummy_step()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
            if "step" in group:
                group["step"] = 0
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"].zero_()

    def _dummy_step(self) -> None:
        if HAVE_APEX_OR_TE:
            super()._init_optimizer_states_with_dummy_values()
            return
        # torch's AdamW counts steps per parameter: wholly frozen shards, which are empty, must count along.
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.zeros_like(param)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._choose_kernel()  # the loaded groups have their own
        for group in self.optimizer.param_groups:
            # A float in a checkpoint of torch's AdamW; Transformer Engine's kernel takes whole numbers.
            if "step" in group:
                group["step"] = int(group["step"])
        for param, state in self.optimizer.state.items():
            # Loading leaves one `step` tensor in all states, which would then advance once per parameter.
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
                if self.fused_adam:
                    state["step"] = state["step"].to(param.device)  # where the fused kernel counts

    def sharded_state_dict(self, model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any) -> Any:
        if not self.is_stub_optimizer and len(self.optimizer.state) == 0:
            # Before its first step an optimizer has no moments to load into, or to save.
            self._init_optimizer_states_with_dummy_values()
        return super().sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs)


UNSUPPORTED = {
    "use_precision_aware_optimizer": "it keeps main weights inside Transformer Engine's optimizer",
    "optimizer_cpu_offload": "it keeps main weights on the CPU in its own layout",
}


def build_optimizer(
    config: OptimizerConfig, chunks: list[DistributedDataParallel], shield: LocalShield, *, fused_adam: bool = False
) -> MegatronOptimizer:
    """megatron's optimizer for the DDP-wrapped `chunks`, its distributed members shielded.

    Raises:
        UserError: an optimizer that keeps its weights where a shield cannot reach them.
    """
    if config.optimizer != "adam":
        raise UserError(f"train.optimizer.optimizer: {config.optimizer!r} is not supported with a shield; use adam")
    for key, why in UNSUPPORTED.items():
        if getattr(config, key):
            raise UserError(f"train.optimizer.{key}: not supported with a shield: {why}; leave it out")
    with distributed_optimizer_class(ShieldedDistributedOptimizer, shield=shield, fused_adam=fused_adam):
        return get_megatron_optimizer(config, chunks)


def state_bytes(optimizer: MegatronOptimizer) -> int:
    """Bytes of main weights and moments that this rank's optimizer holds (scalars such as `step` left out).

    A main weight that is a view of the model's own fp32 weight is counted as well: Adam works on it.
    """
    total = 0
    for member in optimizer.chained_optimizers:
        for group in member.optimizer.param_groups:
            for param in group["params"]:
                total += param.nbytes
                state = member.optimizer.state.get(param, {})
                total += sum(t.nbytes for t in state.values() if isinstance(t, torch.Tensor) and t.dim() > 0)
    return total
