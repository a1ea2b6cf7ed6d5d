"""What a checkpoint holds: sharded state of model, optimizer and random numbers, and reading it with care."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import get_fp8_recipe
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ssu.engine.checkpoint_io import check_metadata, weights_only_checkpoints
from megatron_ssu.engine.device import local_device
from megatron_ssu.engine.ranks import on_all_ranks
from megatron_ssu.errors import UserError
from megatron_ssu.methods.base import Method
from megatron_ssu.models.parallel_model import ParallelModel
from megatron_ssu.train.optimizer_state import OptimizerState
from megatron_ssu.train.scaling import restore_scaling, scaling_room, scaling_state

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
    session: ParallelModel, optimizer: OptimizerState, method: Method, path: Path, *, with_rng: bool
) -> None:
    """Load what a checkpoint holds besides the model: the optimizer's state, that of FP8 scaling, and random numbers.

    Collective. Raises UserError as `read_sharded`.
    """
    model = weights_state(session, method)
    state = {
        "optimizer": optimizer.to_load(model),
        "scaling": scaling_room(session, _stored(path)) if uses_delayed_scaling(session) else {},
        **({"rng": _rng(session)} if with_rng else {}),
    }
    loaded = read_sharded(state, path)
    optimizer.load(loaded["optimizer"], model)
    if uses_delayed_scaling(session):
        restore_scaling(session, loaded.get("scaling", {}), get_fp8_recipe(session.config))
    if with_rng:
        set_rng(loaded["rng"])


def uses_delayed_scaling(session: ParallelModel) -> bool:
    return bool(session.config.fp8) and session.config.fp8_recipe == Fp8Recipe.delayed


def _stored(path: Path) -> dict[str, ShardedTensor]:
    """A checkpoint's tensors by key, without data; its `.metadata` has been checked."""
    return dist_checkpointing.load_tensors_metadata(str(path))


def model_state(session: ParallelModel) -> dict[str, Any]:
    """The chunks' sharded state dicts by name: `model`, or `model0`, `model1`, ... under virtual pipeline stages."""
    found = {}
    for name, chunk in zip(_chunk_names(session), session.chunks, strict=True):
        state = chunk.sharded_state_dict(metadata=_metadata())
        # Transformer Engine pickles into `_extra_state`, and other layers have none of it; see scaling.py.
        found[name] = {key: value for key, value in state.items() if not key.endswith("_extra_state")}
    return found


def weights_state(session: ParallelModel, method: Method) -> dict[str, Any]:
    """`model_state`, and what the method has beside the model's weights, as `method`."""
    own = method.sharded_state(session)
    return {**model_state(session), **({"method": own} if own else {})}


def load_model(session: ParallelModel, method: Method, path: Path) -> None:
    """Load a checkpoint's weights into the chunks, and the method's own, in place; collective.

    Raises UserError as `read_sharded`.
    """
    state = weights_state(session, method)
    apply_factories(state)  # parts of fused weights become views of them: nothing is left to be put together
    assert all(entry.data.is_contiguous() for entry in nested_values(state) if isinstance(entry, ShardedTensor))
    read_sharded(state, path)


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
    return {**facts, "device": local_device().type}


def _rng(session: ParallelModel) -> ShardedTensor:
    """This rank's generators as a row of bytes uint8 [1, RNG_BYTES]: tensors need no unpickling."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    if len(data) > RNG_BYTES:
        raise RuntimeError(f"{len(data)} bytes of random number generators do not fit in {RNG_BYTES}")
    row = torch.frombuffer(bytearray(data.ljust(RNG_BYTES, b"\0")), dtype=torch.uint8).view(1, -1)
    return ShardedTensor.from_rank_offsets("rng", row, (0, dist.get_rank(), dist.get_world_size()))


def set_rng(row: torch.Tensor) -> None:
    """Put back what `_rng` took."""
    state = torch.load(io.BytesIO(row.cpu().numpy().tobytes()), weights_only=True)
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))


def read_common(path: Path) -> dict[str, Any]:
    """The part of a checkpoint that all ranks share. Raises UserError where it is missing or damaged."""
    try:
        common = dist_checkpointing.load_common_state_dict(str(path))
    except Exception as error:  # megatron and torch raise many kinds for damaged files
        raise damaged(path, error) from error
    if not {"progress", "identity", "mesh"} <= set(common):
        raise UserError(f"{path}: not a checkpoint of this trainer: it lacks progress, identity or mesh")
    _check_metadata(path)
    return common


def read_sharded(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Load `state` from a checkpoint; collective. Raises UserError on all ranks where one meets damage."""

    def load() -> dict[str, Any]:
        try:
            with weights_only_checkpoints():
                return dist_checkpointing.load(state, str(path))
        except (Exception, CheckpointException) as error:  # torch's is no Exception
            raise damaged(path, error) from error

    return on_all_ranks(load)


def damaged(path: Path, error: BaseException) -> UserError:
    """The one line for a checkpoint that cannot be read."""
    return UserError(f"{path}: damaged checkpoint ({one_line(error)}); write an older one's number into `latest`")


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _check_metadata(path: Path) -> None:
    """Refuse a `.metadata` that would run code when torch unpickles it."""
    file = path / ".metadata"
    try:
        check_metadata(file)
    except Exception as error:  # unpickling damaged bytes raises many kinds
        raise damaged(file, error) from error
