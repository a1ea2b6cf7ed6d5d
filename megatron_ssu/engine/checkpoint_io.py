"""Writing and reading the files of megatron's distributed checkpoints.

A rank's files are written in its own process, a failure is kept until the ranks agree on it, and nothing that is read can
run code. megatron-core 0.16 and 0.17 name some of this differently; each function here serves both.
"""

from __future__ import annotations

import io
import pickle
import queue
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as strategies
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from megatron_ssu.io.atomic import to_disk

PORTION = 1 << 28  # bytes that are written before they are put on the disk

_DCP = "torch.distributed.checkpoint"
_METADATA_NAMES = frozenset(  # all that torch 2.13 writes into our `.metadata`: dataclasses, enums, dtypes
    {
        *((f"{_DCP}.metadata", n) for n in ("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata")),
        *((f"{_DCP}.metadata", n) for n in ("TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING")),
        (f"{_DCP}.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        *(("torch", n) for n in ("float32", "bfloat16", "uint8")),
        ("torch.serialization", "_get_layout"),  # a table look-up by name
    }
)
_IS_0_16 = hasattr(FileSystemWriterAsync, "write_preloaded_data_multiproc")  # else 0.17


class Saver(strategies.TorchDistSaveShardedStrategy):
    """megatron's strategy. Weights that all data-parallel ranks hold are written by one of them each, spread by size.

    With `background` what the training would change is copied. Rank 0's failure to write the metadata is kept, not raised
    between the ranks' collectives.
    """

    def __init__(self, *, background: bool) -> None:
        super().__init__("torch_dist", 1, thread_count=1)
        self.background = background
        self.errors: list[BaseException] = []

    def async_save(
        self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, async_strategy: str = "mcore"
    ) -> AsyncRequest:
        """`async_strategy` is what 0.17 asks for, which by itself takes a package that need not be here; it is not used."""
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        distribution = determine_main_replica_uniform_distribution(sharded_state_dict, group)
        distribute_main_replicas_with_precomputed_distribution(sharded_state_dict, group, distribution)
        if self.background:
            _copy_cpu_tensors(sharded_state_dict)
        if _IS_0_16:
            return super().async_save(sharded_state_dict, checkpoint_dir)
        strategies._logged_mcore_async_deprecation = True  # else a line on every rank about a package of NVIDIA's
        return super().async_save(sharded_state_dict, checkpoint_dir, "mcore")

    def _get_save_and_finalize_callbacks(self, writer: Any, plan: Any, *strategy: str) -> AsyncRequest:
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
        return super()._get_save_and_finalize_callbacks(writer, plan, *strategy)


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


@contextmanager
def in_process_checkpoint_writers() -> Iterator[None]:
    """While it lasts, checkpoints are written by the calling process.

    megatron forks writer processes (0.17: starts threads) and starts a manager process for their results: seconds for every
    save, and no fork is safe beside CUDA and data loader threads.
    """
    write = "write_preloaded_data_multiproc" if _IS_0_16 else "write_preloaded_data_multithread"
    results = "_get_write_results_queue" if _IS_0_16 else "get_write_results_queue"
    with (
        _replaced(FileSystemWriterAsync, write, staticmethod(_write_in_process)),
        _replaced(filesystem_async, results, queue.Queue),
    ):
        yield


def _write_in_process(transforms: list, use_msc: bool, rank: int, buckets: list, results: Any) -> None:
    written: Any = {}
    for index, bucket in enumerate(buckets):
        local, running = queue.Queue(), queue.Queue()  # type: ignore[var-annotated]
        running.put(index)
        FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, local, running, True, use_msc=use_msc)
        _, outcome = local.get()
        if isinstance(outcome, Exception):
            written = outcome
            break
        written[index] = outcome
    results.put(written)


@contextmanager
def kept_common_errors() -> Iterator[list[BaseException]]:
    """While it lasts, what rank 0 meets when it writes a checkpoint's common part is put in the list, not raised.

    The other ranks are in a collective by then and would wait for rank 0.
    """
    owner = owner_of_save_common()
    stock = owner.save_common
    errors: list[BaseException] = []

    def save_common(*arguments: Any) -> None:
        try:
            stock(*arguments)
        except Exception as error:
            errors.append(error)

    with _replaced(owner, "save_common", save_common):
        yield errors


def owner_of_save_common() -> Any:
    """The object whose `save_common` writes a checkpoint's common part."""
    return common.TorchCommonSaveStrategy if _IS_0_16 else serialization


@contextmanager
def weights_only_checkpoints() -> Iterator[None]:
    """While it lasts, objects in sharded checkpoints are read with torch's weights-only unpickler."""
    stock = DefaultLoadPlanner.load_bytes

    def load_bytes(self: Any, read_item: Any, value: Any) -> None:
        with torch.serialization.safe_globals([io.BytesIO]):
            loaded = torch.load(value, weights_only=True)
        checked = io.BytesIO()
        torch.save(loaded, checked)
        checked.seek(0)
        stock(self, read_item, checked)

    with _replaced(DefaultLoadPlanner, "load_bytes", load_bytes):
        yield


@contextmanager
def _replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """While it lasts, `owner` has `replacement` under `name`."""
    stock = vars(owner)[name]
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, stock)


# What else Megatron-LM's have in them: pickled objects among the tensors, further dtypes, plans kept for the next save.
_FOREIGN_NAMES = frozenset(
    {
        (f"{_DCP}.metadata", "BytesStorageMetadata"),
        (f"{_DCP}.metadata", "STATE_DICT_TYPE"),
        *(
            (f"{_DCP}.planner", n)
            for n in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
        ),
        (f"{_DCP}.filesystem", "_StoragePrefix"),
        *(("torch", n) for n in ("float16", "float64", "int8", "int16", "int32", "int64", "bool")),
        *(("torch", n) for n in ("float8_e4m3fn", "float8_e5m2", "strided")),
        ("collections", "OrderedDict"),
        ("collections", "defaultdict"),
    }
)


class _MetadataUnpickler(pickle.Unpickler):
    """Reads torch's `.metadata` without letting it name anything but what it is made of."""

    names = _METADATA_NAMES

    def find_class(self, module: str, name: str) -> Any:
        # Whole pairs: the superclass follows the dots of protocol 4's names, and modules hold what they import.
        if (module, name) in self.names:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")


def _memory_format(*arguments: Any) -> _MEM_FORMAT_ENCODING:
    """Stands for getattr, by which Python 3.11.0 to 3.11.3 pickle members of enums."""
    for member in _MEM_FORMAT_ENCODING:
        if arguments == (_MEM_FORMAT_ENCODING, member.name):
            return member
    raise pickle.UnpicklingError("builtins.getattr has no place in a checkpoint's metadata but for memory formats")


def check_metadata(file: Path) -> None:
    """Read a checkpoint's `.metadata` as torch will. Raises whatever damage leads to, and UnpicklingError for one that would
    run code when torch unpickles it."""
    with file.open("rb") as stream:
        _MetadataUnpickler(stream).load()


class _ForeignMetadataUnpickler(_MetadataUnpickler):
    names = _METADATA_NAMES | _FOREIGN_NAMES


def check_foreign_metadata(file: Path) -> None:
    """The same of a checkpoint that Megatron-LM wrote."""
    with file.open("rb") as stream:
        _ForeignMetadataUnpickler(stream).load()


def load_tensors(state: dict[str, Any], folder: Path) -> None:
    """Read the ShardedTensors of `state` in place, and nothing else of the checkpoint: its common part is pickled."""
    strategies.TorchDistLoadShardedStrategy().load(state, folder)
