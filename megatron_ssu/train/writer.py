"""Writing a rank's files of a checkpoint: who writes what, and how far the writer has got."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

PORTION = 1 << 28  # bytes that are written before they are put on the disk


class Saver(TorchDistSaveShardedStrategy):
    """megatron's strategy. Weights that all data-parallel ranks hold are written by one of them each, spread by size.

    With `background` what the training would change is copied. Rank 0's failure to write the metadata is kept, not raised
    between the ranks' collectives.
    """

    def __init__(self, *, background: bool) -> None:
        super().__init__("torch_dist", 1, thread_count=1)
        self.background = background
        self.errors: list[BaseException] = []

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> AsyncRequest:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        distribution = determine_main_replica_uniform_distribution(sharded_state_dict, group)
        distribute_main_replicas_with_precomputed_distribution(sharded_state_dict, group, distribution)
        if self.background:
            _copy_cpu_tensors(sharded_state_dict)
        return super().async_save(sharded_state_dict, checkpoint_dir)

    def _get_save_and_finalize_callbacks(self, writer: Any, plan: Any) -> AsyncRequest:
        finish, held, errors = type(writer).finish, weakref.ref(writer), self.errors

        def guarded(*arguments: Any) -> None:  # holds no writer: that would keep the writer's tensors for good
            try:
                finish(held(), *arguments)
            except Exception as error:  # raised again once the ranks agree
                errors.append(error)

        writer.finish = guarded
        metadata = plan[1]
        if metadata is not None:
            vars(metadata).pop("all_local_plans", None)  # says everything twice, and is of use to megatron's cache only
        return super()._get_save_and_finalize_callbacks(writer, plan)


def _copy_cpu_tensors(state: dict[str, Any]) -> None:
    """Copy the model's weights that this rank writes and that live on the CPU: they would change under the writer.

    What lives on the GPU is staged anyway, and the optimizer's state is a copy.
    """
    for value in nested_values(state):
        if not isinstance(value, ShardedTensor) or value.key.startswith("optimizer."):
            continue
        if is_main_replica(value.replica_id) and value.data.device.type == "cpu":
            value.data = value.data.detach().clone()


def watched(buckets: list[Any], step: Callable[[], None]) -> list[Any]:
    """megatron's write buckets, for one pass; `step` is called after every tensor that was written."""
    return [
        (file, key, (objects, _in_portions(tensors, Path(file), step))) for file, key, (objects, tensors) in buckets
    ]


def _in_portions(tensors: list[Any], file: Path, step: Callable[[], None]) -> Iterator[Any]:
    """The same tensors. Every PORTION bytes `file` is put on the disk: else a slow one would take all it gets into the
    page cache, and then not show for very long how far it is."""
    written = 0
    for item, tensor in tensors:
        yield item, tensor
        written += tensor.nbytes
        if written >= PORTION:
            to_disk(file)
            written = 0
        step()


def to_disk(path: Path) -> None:
    """Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
