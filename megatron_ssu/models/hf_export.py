"""Write any mesh back to a Hugging Face directory.

Up to WRITERS ranks write, each its own files. Tensor by tensor a writer receives the pieces from the ranks that hold them, and
a thread streams them into the file meanwhile, so that a writer holds QUEUE + 2 tensors at most. Everything is written into a
folder beside the target that takes its name when it is complete; all writers must see it.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import struct
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ssu.engine.mesh import Mesh
from megatron_ssu.engine.ranks import gathered, on_rank_zero
from megatron_ssu.errors import UserError
from megatron_ssu.models.collect import Collector
from megatron_ssu.models.hf_files import EXPORT_RECORD, INDEX_FILE, HFCheckpoint, carry_files, row_window
from megatron_ssu.models.hf_import import DTYPE_NAMES
from megatron_ssu.models.layout import Layout
from megatron_ssu.models.matrix import Matrix

WRITERS = 8  # ranks that write at most
QUEUE = 2  # tensors that wait for a writer's disk


@dataclass(frozen=True)
class Tensor:
    """A tensor of the new checkpoint: its name, the matrices that are its rows, its stored dtype ('BF16', 'F32', ...)."""

    name: str
    matrices: tuple[Matrix, ...]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.matrices[0]
        return (sum(matrix.shape[0] for matrix in self.matrices), *first.shape[1:])

    @property
    def nbytes(self) -> int:
        return sum(matrix.elements for matrix in self.matrices) * DTYPE_NAMES[self.dtype].itemsize


def plan_files(tensors: list[Tensor], max_shard_size: int) -> dict[str, list[Tensor]]:
    """Divide tensors over files of at most `max_shard_size` bytes (a larger tensor has a file of its own), in order."""
    files: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if files[-1] and filled + tensor.nbytes > max_shard_size:
            files.append([])
            filled = 0
        files[-1].append(tensor)
        filled += tensor.nbytes
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": part for i, part in enumerate(files, 1)}


def check_target(target: str | Path, key: str) -> Path:
    """The whole path of `target`, where an export can be written there; asked before a model is loaded.

    `key` names the option or key that gave it. Raises UserError for a place that is taken or cannot be written.
    """
    if str(target).startswith("~"):
        raise UserError(f"{key}: {target}: ~ is not expanded; write the whole path")
    try:
        path = Path(target).resolve()
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
        parent = next((p for p in path.parents if p.exists()), path)
    except OSError as error:
        raise UserError(f"{key}: {target} cannot be made ({error.strerror}); name another directory") from error
    if path == Path.cwd():
        raise UserError(f"{key}: {str(target)!r} is the current directory; name a directory to make")
    if taken:
        raise UserError(f"{key}: {target} exists already and is not overwritten; name another directory or remove it")
    if not parent.is_dir():
        raise UserError(f"{key}: {target} cannot be made in {parent} (it is a file); name another directory")
    try:
        Path(tempfile.mkdtemp(prefix=".megatron-ssu-", dir=parent)).rmdir()  # permissions do not say all
    except OSError as error:
        raise UserError(
            f"{key}: {target} cannot be made in {parent} ({error.strerror}); name another directory"
        ) from error
    return path


def export_model(
    layout: Layout,
    mesh: Mesh,
    source: HFCheckpoint,
    target: Path,
    max_shard_size: int,
    *,
    record: str | None = None,
    further: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write the model to the Hugging Face directory `target`, each tensor in the dtype that `source` stores it in.

    Collective over all ranks. Config, tokenizer and generation config are carried over from `source`. `record` (on rank 0)
    is the text of the export's own record; `further` (on all ranks) writes more into the folder that becomes `target`.

    Raises:
        UserError: `target` exists, or cannot be written.
    """
    stored = set(source.names())
    tied_heads = [n for e in layout.family.edges if e.kinds == ("head",) for n in e.tensors if n in stored]
    _export(layout, mesh, source.directory, target, max_shard_size, source.dtype, tied_heads, record, further)


def export_as(
    layout: Layout, mesh: Mesh, beside: Path, target: Path, max_shard_size: int, dtype: str, record: str
) -> None:
    """Write a model that no Hugging Face directory has, each tensor as `dtype` ('BF16', 'F32'); as `export_model` otherwise.

    `beside`: the directory of its config and tokenizer.
    """
    _export(layout, mesh, beside, target, max_shard_size, lambda name: dtype, [], record, lambda folder: None)


def _export(
    layout: Layout,
    mesh: Mesh,
    beside: Path,
    target: Path,
    max_shard_size: int,
    dtype_of: Callable[[str], str],
    tied_heads: list[str],
    record: str | None,
    further: Callable[[Path], None],
) -> None:
    stored_in: dict[str, list[Matrix]] = {}
    for matrix in layout.family.matrices(layout.dims):
        stored_in.setdefault(row_window(matrix.name)[0], []).append(matrix)
    tensors = [Tensor(name, tuple(found), dtype_of(name)) for name, found in stored_in.items()]
    if layout.dims.tied:
        # Some checkpoints store the tied head as well.
        embedding = next(t for t in tensors if t.matrices[0].kind == "embedding")
        tensors += [Tensor(name, embedding.matrices, embedding.dtype) for name in tied_heads]
    files = plan_files(tensors, max_shard_size)
    collect = Collector(layout, mesh)
    partial = target.with_name(f".{target.name}.partial")
    on_rank_zero(lambda: _prepare(target, partial))
    writers = writing_ranks(mesh.world, len(files))
    writer = _Writer(partial)
    for number, (name, part) in enumerate(files.items()):
        to = writers[number % len(writers)]
        if mesh.rank == to:
            writer.begin(name, part)
        for tensor in part:
            for matrix in tensor.matrices:
                whole = collect(matrix, DTYPE_NAMES[tensor.dtype], to)
                if mesh.rank == to:
                    writer.write(whole)
        if mesh.rank == to:
            writer.end()
    further(partial)
    writer.close()
    failed = next((reason for reason in gathered(writer.reason) if reason), None)
    try:
        on_rank_zero(lambda: _finish(failed, files, beside, target, partial, record))
    finally:
        if writer.bug is not None:
            raise writer.bug


def writing_ranks(world: int, files: int) -> list[int]:
    """The ranks that write so many files, spread over the nodes of a job of `world` ranks."""
    count = min(WRITERS, world, files)
    return [number * world // count for number in range(count)]


def _prepare(target: Path, partial: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists already and is not overwritten; name another directory or remove it")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{partial}: cannot be made: {error.strerror}; name a directory that can be written") from error


def _finish(
    failed: str | None, files: dict[str, list[Tensor]], source: Path, target: Path, partial: Path, record: str | None
) -> None:
    """Write what is beside the weights, and give the folder its name; or take it away where writing `failed`."""

    def rest() -> None:
        if len(files) > 1:
            total = sum(t.nbytes for part in files.values() for t in part)
            weight_map = {t.name: name for name, part in files.items() for t in part}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (partial / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        carry_files(source, partial)
        if record is not None:
            (partial / EXPORT_RECORD).write_text(record, encoding="utf-8")
        if target.exists():
            target.rmdir()
        os.replace(partial, target)

    if failed is None:
        try:
            rest()
        except OSError as error:
            failed = str(error.strerror)
    if failed is not None:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{target}: cannot be written: {failed}; nothing was left behind")


class _Writer:
    """Streams safetensors files in a thread. A failed write is kept, so that the other ranks can continue to the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reason: str | None = None  # why a write failed; known when it is closed
        self.bug: Exception | None = None  # where it was not the file system
        self.file: Any = None
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUE)
        self._thread: threading.Thread | None = None

    def begin(self, name: str, tensors: list[Tensor]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in tensors:
            header[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.nbytes],
            }
            offset += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._later(lambda: self._open(name, struct.pack("<Q", len(text)) + text))

    def _open(self, name: str, head: bytes) -> None:
        self.file = open(self.folder / name, "wb")  # noqa: SIM115
        self.file.write(head)

    def write(self, tensor: torch.Tensor) -> None:
        self._later(lambda: self.file.write(tensor.contiguous().view(torch.uint8).numpy().data))

    def end(self) -> None:
        def close() -> None:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()

        self._later(close)

    def close(self) -> None:
        """Wait until all is written; `reason` is final then."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def _later(self, work: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="export", daemon=True)
            self._thread.start()
        self._queue.put(work)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            if self.reason is None:
                try:
                    work()
                except OSError as error:
                    self.reason = str(error.strerror or error)
                except Exception as error:  # raised when the ranks are through, which would wait for this thread
                    self.reason, self.bug = f"{type(error).__name__}: {error}", error
