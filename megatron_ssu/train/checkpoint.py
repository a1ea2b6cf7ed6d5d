"""Checkpoints of a run: megatron's dist_checkpointing directories, fully reshardable.

    <checkpoint.directory>/checkpoints/iter_0000500/     one checkpoint
    <checkpoint.directory>/checkpoints/latest            the number of the newest complete one

A checkpoint is written under a `.part` name and renamed when every rank has finished; `latest` moves after that.
"""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ssu import runtime
from megatron_ssu.errors import UserError
from megatron_ssu.session import Session

log = logging.getLogger(__name__)

LATEST = "latest"


@dataclass
class Progress:
    """Where a run is."""

    iteration: int = 0
    samples: int = 0  # of the training data, consumed


@dataclass
class Identity:
    """What must not change between a checkpoint and the run that goes on from it: key -> value, compared one by one."""

    facts: dict[str, Any]

    def compare(self, saved: dict[str, Any], path: Path) -> None:
        """Raises UserError naming the first fact that differs."""
        for key, value in self.facts.items():
            if key in saved and saved[key] != value:
                raise UserError(
                    f"{path}: {key} was {saved[key]!r} in this checkpoint and is {value!r} now; "
                    "change it back, or start in another checkpoint.directory"
                )


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, directory: str | Path, keep: int | None = None) -> None:
        self.folder, self.keep = Path(directory) / "checkpoints", keep

    def path(self, iteration: int) -> Path:
        return self.folder / f"iter_{iteration:07d}"

    def latest(self) -> int | None:
        """Iteration of the newest complete checkpoint, or None. Raises UserError for a damaged `latest`."""
        file = self.folder / LATEST
        if not file.exists():
            return None
        text = file.read_text(errors="replace").strip()
        if not text.isdecimal() or not self.path(int(text)).is_dir():
            raise UserError(
                f"{file}: says {text[:40]!r}, which is no checkpoint here; write the iteration of one that is"
            )
        return int(text)

    def clean(self) -> None:
        """Remove what an interrupted save left behind. On rank 0."""
        for part in self.folder.glob("iter_*.part"):
            log.warning("%s: a checkpoint that was not finished; removed", part)
            shutil.rmtree(part, ignore_errors=True)

    def save(
        self,
        session: Session,
        progress: Progress,
        identity: Identity,
        optimizer: MegatronOptimizer,
        schedule: OptimizerParamScheduler,
    ) -> Path:
        """Write a checkpoint; collective. Raises UserError where it cannot be written; the one before stays whole."""
        final = self.path(progress.iteration)
        part = final.with_name(final.name + ".part")

        def begin() -> None:
            try:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
            except OSError as error:
                raise UserError(f"{part}: cannot be made: {error.strerror}") from error

        runtime.on_rank_zero(begin)
        state = _sharded_state(session, optimizer, schedule, is_loading=False)
        state["progress"] = {"iteration": progress.iteration, "samples": progress.samples}
        state["identity"] = identity.facts
        state["mesh"] = _mesh(session)

        def write() -> None:
            try:
                with runtime.in_process_checkpoint_writers():
                    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
                    dist_checkpointing.save(state, str(part), strategy)
            except OSError as error:
                raise UserError(
                    f"{part}: cannot be written: {error.strerror}; the checkpoint before it is whole"
                ) from error

        runtime.on_all_ranks(write)
        runtime.on_rank_zero(lambda: self._publish(part, final, progress.iteration))
        return final

    def _publish(self, part: Path, final: Path, iteration: int) -> None:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
        fresh = self.folder / (LATEST + ".part")
        fresh.write_text(f"{iteration}\n")
        os.replace(fresh, self.folder / LATEST)
        if self.keep is not None:
            found = sorted(p for p in self.folder.iterdir() if re.fullmatch(r"iter_\d+", p.name))
            for old in found[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)

    def load(
        self,
        iteration: int,
        session: Session,
        identity: Identity,
        optimizer: MegatronOptimizer,
        schedule: OptimizerParamScheduler,
    ) -> Progress:
        """Load model, optimizer, schedule and RNG from a checkpoint of any mesh; collective.

        Raises:
            UserError: the checkpoint is damaged, or belongs to another run.
        """
        path = self.path(iteration)
        common = runtime.on_all_ranks(lambda: read_common(path))
        identity.compare(common["identity"], path)
        state = _sharded_state(session, optimizer, schedule, is_loading=True)
        same_mesh = common["mesh"] == _mesh(session)
        if not same_mesh:
            state.pop("rng")
        loaded = _load(state, path)
        _load_model(session, loaded)
        optimizer.load_state_dict(loaded["optimizer"])
        schedule.load_state_dict(loaded["schedule"])
        if same_mesh:
            _set_rng(loaded["rng"])
        return Progress(**loaded["progress"])

    def load_weights(self, iteration: int, session: Session) -> None:
        """Load the model's weights alone; collective."""
        path = self.path(iteration)
        runtime.on_all_ranks(lambda: read_common(path))
        _load_model(session, _load(_model_state(session), path))


def read_common(path: Path) -> dict[str, Any]:
    """The part of a checkpoint that all ranks share. Raises UserError where it is missing or damaged."""
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint; `latest` beside it names the newest")
    try:
        common = dist_checkpointing.load_common_state_dict(str(path))
    except Exception as error:  # megatron and torch raise many kinds for damaged files
        raise UserError(f"{path}: damaged checkpoint ({_one_line(error)}); go on from an older one") from error
    if not {"progress", "identity", "mesh"} <= set(common):
        raise UserError(f"{path}: not a checkpoint of this trainer: it lacks progress, identity or mesh")
    return common


def _load(state: dict[str, Any], path: Path) -> dict[str, Any]:
    def load() -> dict[str, Any]:
        try:
            return dist_checkpointing.load(state, str(path))
        except Exception as error:  # as in read_common
            raise UserError(f"{path}: damaged checkpoint ({_one_line(error)}); go on from an older one") from error

    return runtime.on_all_ranks(load)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _model_state(session: Session) -> dict[str, Any]:
    """The chunks' sharded state dicts by name: `model`, or `model0`, `model1`, ... under virtual pipeline stages."""
    names = ["model"] if len(session.chunks) == 1 else [f"model{i}" for i in range(len(session.chunks))]
    return {n: c.sharded_state_dict(metadata=_metadata()) for n, c in zip(names, session.chunks, strict=True)}


def _load_model(session: Session, loaded: dict[str, Any]) -> None:
    names = [n for n in loaded if n.startswith("model")]
    for name, chunk in zip(sorted(names), session.chunks, strict=True):
        chunk.load_state_dict(loaded[name], strict=True)


def _sharded_state(
    session: Session, optimizer: MegatronOptimizer, schedule: OptimizerParamScheduler, *, is_loading: bool
) -> dict[str, Any]:
    model = _model_state(session)
    return {
        **model,
        "optimizer": optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_metadata()),
        "schedule": schedule.state_dict(),
        "rng": _rng_object(session),
    }


def _mesh(session: Session) -> dict[str, Any]:
    mesh = session.mesh
    return {k: getattr(mesh, k) for k in ("tensor", "pipeline", "virtual", "context", "data")}


def _rng_object(session: Session) -> ShardedObject:
    """This rank's random number generators; read back on the same mesh only."""
    state = {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
        "python": random.getstate(),
    }
    return ShardedObject("rng", state, (dist.get_world_size(),), (session.mesh.rank,), replica_id=0)


def _set_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
