"""The format of checkpoints: how a state is written into a folder and read back.

`Checkpoints` decides which checkpoints there are, when they are written, kept and complete; a `Storage` writes and reads one.
Another format is another class with these methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ssu.engine.checkpoint_io import (
    Saver,
    check_metadata,
    in_process_checkpoint_writers,
    kept_common_errors,
    watched,
    weights_only_checkpoints,
)
from megatron_ssu.engine.ranks import on_all_ranks
from megatron_ssu.errors import UserError, named_line
from megatron_ssu.train.checksums import damaged_checkpoint

State = dict[str, Any]  # ShardedTensors and, equal on all ranks, plain values; nested
Advance = Callable[[], None]


@dataclass
class WriteRequest:
    """What a rank has still to do for a checkpoint whose state has been taken.

    `write` writes this rank's files, in any thread, and returns them; it calls its argument whenever it got further. None
    where there is nothing to write. `finalize` is collective, and called when every rank has written; it raises what failed.
    """

    write: Callable[[Advance], Iterable[Path]] | None
    finalize: Callable[[], None]
    errors: list[BaseException] = field(default_factory=list)  # kept so far, for the ranks to agree on


class Storage(Protocol):
    """Writes and reads the state of one checkpoint in a folder that all ranks see."""

    def write(self, state: State, folder: Path, *, background: bool) -> WriteRequest:
        """Take the state, so that training may continue when this returns if `background`; collective.

        Errors of single ranks are kept in the request.
        """

    def complete(self, folder: Path) -> None:
        """Mark the folder as a whole checkpoint, on rank 0, when all is written. Raises OSError."""

    def read_common(self, folder: Path) -> State:
        """The part of a state that is equal on all ranks. Raises UserError where it is missing or damaged."""

    def read(self, state: State, folder: Path) -> State:
        """Read what `state` names, its tensors in place; collective. Raises UserError on all ranks where one meets damage."""

    def tensors(self, folder: Path) -> dict[str, ShardedTensor]:
        """All tensors by key, without data."""


class DistCheckpointing:
    """megatron's dist_checkpointing, fully reshardable, in torch's file format."""

    def write(self, state: State, folder: Path, *, background: bool) -> WriteRequest:
        saver = Saver(background=background)
        with in_process_checkpoint_writers(), kept_common_errors() as errors:
            request = dist_checkpointing.save(state, str(folder), saver, async_sharded_save=True)
        assert request is not None

        def write(advance: Advance) -> Iterable[Path]:
            arguments = list(request.async_fn_args)
            arguments[1] = watched(buckets, advance)
            request.async_fn(*arguments)
            return sorted(folder.glob(f"__{rank}_*.distcp"))

        def finalize() -> None:
            try:
                request.finalize_fns[0]()
            except CheckpointException as error:  # torch's is no Exception
                raise RuntimeError(str(error)) from error
            if saver.errors:
                raise saver.errors[0]

        if request.async_fn is None:
            return WriteRequest(None, finalize, errors)
        rank, buckets = dist.get_rank(), request.preload_fn()
        return WriteRequest(write, finalize, errors)

    def complete(self, folder: Path) -> None:
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))

    def read_common(self, folder: Path) -> State:
        try:
            common = dist_checkpointing.load_common_state_dict(str(folder))
        except Exception as error:  # megatron and torch raise many kinds for damaged files
            raise damaged_checkpoint(folder, named_line(error)) from error
        if not {"progress", "identity", "mesh"} <= set(common):
            raise UserError(f"{folder}: not a checkpoint of this trainer: it lacks progress, identity or mesh")
        _check_metadata(folder)
        return common

    def read(self, state: State, folder: Path) -> State:
        def load() -> State:
            try:
                with weights_only_checkpoints():
                    return dist_checkpointing.load(state, str(folder))
            except (Exception, CheckpointException) as error:  # torch's is no Exception
                raise damaged_checkpoint(folder, named_line(error)) from error

        return on_all_ranks(load)

    def tensors(self, folder: Path) -> dict[str, ShardedTensor]:
        return dist_checkpointing.load_tensors_metadata(str(folder))


def _check_metadata(folder: Path) -> None:
    """Refuse a `.metadata` that would run code when torch unpickles it."""
    file = folder / ".metadata"
    try:
        check_metadata(file)
    except Exception as error:  # unpickling damaged bytes raises many kinds
        raise damaged_checkpoint(file, named_line(error)) from error
