"""What a checkpoint holds: sharded state of model, optimizer and random numbers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import get_fp8_recipe

from megatron_ssu.engine.device import local_device
from megatron_ssu.engine.random_numbers import generators, set_generators
from megatron_ssu.methods.base import Method
from megatron_ssu.models.parallel_model import ParallelModel
from megatron_ssu.train.optimizer_state import OptimizerState
from megatron_ssu.train.scaling import restore_scaling, scaling_room, scaling_state
from megatron_ssu.train.storage import Storage

RNG_BYTES = 1 << 16  # room for one rank's generators


def sharded_state(session: ParallelModel, optimizer: OptimizerState, method: Method) -> dict[str, Any]:
    """This rank's part of a checkpoint, as dist_checkpointing takes it."""
    model = weights_state(session, method)
    return {
        **model,
        "optimizer": optimizer.to_save(model),
        "rng": _rng(session),
        "scaling": scaling_state(session),
    }


def load_training(
    session: ParallelModel,
    optimizer: OptimizerState,
    method: Method,
    storage: Storage,
    path: Path,
    *,
    with_rng: bool,
) -> None:
    """Load what a checkpoint holds besides the model: the optimizer's state, that of FP8 scaling, and random numbers.

    Collective. Raises UserError as `Storage.read`.
    """
    model = weights_state(session, method)
    state = {
        "optimizer": optimizer.to_load(model),
        "scaling": scaling_room(session, storage.tensors(path)) if uses_delayed_scaling(session) else {},
        **({"rng": _rng(session)} if with_rng else {}),
    }
    loaded = storage.read(state, path)
    optimizer.load(loaded["optimizer"], model)
    if uses_delayed_scaling(session):
        restore_scaling(session, loaded.get("scaling", {}), get_fp8_recipe(session.config))
    if with_rng:
        set_rng(loaded["rng"])


def uses_delayed_scaling(session: ParallelModel) -> bool:
    return bool(session.config.fp8) and session.config.fp8_recipe == Fp8Recipe.delayed


def model_state(session: ParallelModel, *, extra_state: bool = False) -> dict[str, Any]:
    """The chunks' sharded state dicts by name: `model`, or `model0`, `model1`, ... under virtual pipeline stages.

    With `extra_state` also that of megatron's and Transformer Engine's layers, pickled or empty objects.
    """
    found = {}
    for name, chunk in zip(_chunk_names(session), session.chunks, strict=True):
        state = chunk.sharded_state_dict(metadata=_metadata())
        # Transformer Engine pickles into `_extra_state`, and other layers have none of it; see scaling.py.
        found[name] = {key: value for key, value in state.items() if extra_state or not key.endswith("_extra_state")}
    return found


def weights_state(session: ParallelModel, method: Method) -> dict[str, Any]:
    """`model_state`, and what the method has beside the model's weights, as `method`."""
    own = method.sharded_state(session)
    return {**model_state(session), **({"method": own} if own else {})}


def load_model(session: ParallelModel, method: Method, storage: Storage, path: Path) -> None:
    """Load a checkpoint's weights into the chunks, and the method's own, in place; collective.

    Raises UserError as `Storage.read`.
    """
    state = weights_state(session, method)
    apply_factories(state)  # parts of fused weights become views of them: nothing is left to be put together
    assert all(entry.data.is_contiguous() for entry in nested_values(state) if isinstance(entry, ShardedTensor))
    storage.read(state, path)


def _chunk_names(session: ParallelModel) -> list[str]:
    return ["model"] if len(session.chunks) == 1 else [f"model{i}" for i in range(len(session.chunks))]


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def mesh_facts(session: ParallelModel) -> dict[str, Any]:
    """The mesh and the kind of device; random number generators are read back on the same one only."""
    mesh = session.mesh
    facts = {k: getattr(mesh, k) for k in ("tensor", "pipeline", "virtual", "context", "data")}
    return {**facts, **({"expert": mesh.expert} if mesh.expert > 1 else {}), "device": local_device().type}


def _rng(session: ParallelModel) -> ShardedTensor:
    """This rank's generators as a row of bytes uint8 [1, RNG_BYTES]: tensors need no unpickling."""
    buffer = io.BytesIO()
    torch.save(generators(), buffer)
    data = buffer.getvalue()
    if len(data) > RNG_BYTES:
        raise RuntimeError(f"{len(data)} bytes of random number generators do not fit in {RNG_BYTES}")
    row = torch.frombuffer(bytearray(data.ljust(RNG_BYTES, b"\0")), dtype=torch.uint8).view(1, -1)
    return ShardedTensor.from_rank_offsets("rng", row, (0, dist.get_rank(), dist.get_world_size()))


def set_rng(row: torch.Tensor) -> None:
    """Put back what `_rng` took."""
    set_generators(torch.load(io.BytesIO(row.cpu().numpy().tobytes()), weights_only=True))
