"""FP8 state in checkpoints: the scales and amax histories of Transformer Engine's delayed scaling.

Transformer Engine pickles them into `_extra_state`, and refuses to read that back. Here they are plain tensors, two for every
module, named by the layer's number in the whole model:

    fp8_scaling.decoder.layers.12.mlp.linear_fc1.fwd     float32 [1 + history, n]: scales, then the amax history
    fp8_scaling.decoder.layers.12.mlp.linear_fc1.bwd

n counts the tensors that are quantised: 3 per GEMM forward, 2 backward. Delayed scaling reduces amaxes over the tensor- and
data-parallel ranks, so that these have the same state; what a rank has noted since the last reduction is reduced here in the
same way (largest amax, smallest scale). So one copy is stored, and serves any mesh. With `tp_only_amax_red`, where
data-parallel ranks differ, all of them resume with the largest amaxes. Other recipes keep no state.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_ssu.models.parallel_model import ParallelModel

PREFIX = "fp8_scaling."
_META = {"fwd": "scaling_fwd", "bwd": "scaling_bwd"}  # our name -> key of a module's fp8_meta
_FORWARD_TENSORS = 3  # of a GEMM: input, weight, output


def scaling_state(session: ParallelModel) -> dict[str, ShardedTensor]:
    """This rank's delayed scaling state for a save; empty where there is none. Collective among the ranks of a stage."""
    found = {}
    for name, module in _modules(session):
        for direction, key in _META.items():
            state = module.fp8_meta.get(key)
            if hasattr(state, "scale") and hasattr(state, "amax_history"):
                found[f"{PREFIX}{name}.{direction}"] = torch.cat(
                    [-state.scale.detach()[None], state.amax_history.detach()]
                )
    if found:
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        flat = torch.cat([tensor.reshape(-1) for tensor in found.values()])
        dist.all_reduce(flat, dist.ReduceOp.MAX, group=group)
        parts = flat.split([tensor.numel() for tensor in found.values()])
        found = {key: part.view(tensor.shape) for (key, tensor), part in zip(found.items(), parts, strict=True)}
    replica = (0, parallel_state.get_tensor_model_parallel_rank(), _data_rank())
    state = {}
    for key, tensor in found.items():
        tensor = tensor.clone()
        tensor[0].neg_()
        state[key] = ShardedTensor.from_rank_offsets(key, tensor, replica_id=replica)
    return state


def scaling_room(session: ParallelModel, stored: dict[str, ShardedTensor]) -> dict[str, ShardedTensor]:
    """What to load of the checkpoint's tensors `stored` (by key, without data) into this rank's modules."""
    keys = {f"{PREFIX}{name}.{direction}" for name, _ in _modules(session) for direction in _META}
    replica = (0, parallel_state.get_tensor_model_parallel_rank(), _data_rank())
    return {
        key: ShardedTensor.from_rank_offsets(key, torch.empty(stored[key].global_shape), replica_id=replica)
        for key in sorted(keys & stored.keys())
    }


def restore_scaling(session: ParallelModel, loaded: dict[str, torch.Tensor], recipe: Any) -> None:
    """Put loaded state into the modules, ready for `recipe`; a history of another length is cut or filled up with zeros."""
    for name, module in _modules(session):
        parts = {d: loaded[f"{PREFIX}{name}.{d}"] for d in _META if f"{PREFIX}{name}.{d}" in loaded}
        if not parts:
            continue
        meta = module.fp8_meta
        meta["recipe"] = recipe
        if "fwd" in parts:
            meta.setdefault("num_gemms", parts["fwd"].shape[1] // _FORWARD_TENSORS)
        module.init_fp8_meta_tensors(recipe)
        for direction, part in parts.items():
            state = meta[_META[direction]]
            state.scale.copy_(part[0])
            rows = min(len(part) - 1, len(state.amax_history))
            state.amax_history.zero_()
            state.amax_history[:rows].copy_(part[1 : 1 + rows])


def _modules(session: ParallelModel) -> Iterator[tuple[str, Any]]:
    """Modules that may have FP8 state, named with their layers' numbers in the whole model."""
    for chunk in session.chunks:
        for name, module in chunk.named_modules():
            if not hasattr(module, "fp8_meta"):
                continue
            found = re.match(r"(decoder\.layers\.)(\d+)\.", name)
            if found:
                number = chunk.decoder.layers[int(found[2])].layer_number - 1
                name = f"{found[1]}{number}.{name[found.end() :]}"
            yield name, module


def _data_rank() -> int:
    return parallel_state.get_data_parallel_rank(with_context_parallel=True)
