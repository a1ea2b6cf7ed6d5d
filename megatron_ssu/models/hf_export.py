"""Write any mesh back to a Hugging Face directory.

Several ranks write, each a file at a time: portion by portion (rows of tensors, of 32 MiB in all) it receives the pieces from
the nearest ranks that hold them, while a thread writes the portion before. A writer holds at most four portions, two of them on
its device; a rank that sends holds its parts of one portion per writer. The files' contents depend neither on the mesh nor on
the writers. Everything is written into a folder beside the target that takes its name when it is complete.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch

from megatron_ssu.engine.mesh import Mesh
from megatron_ssu.engine.ranks import gathered, on_all_ranks, on_rank_zero
from megatron_ssu.errors import UserError
from megatron_ssu.models.collect import PORTION, Collector, Rows, portions
from megatron_ssu.models.family import Dims, Family
from megatron_ssu.models.hf_files import EXPORT_RECORD, INDEX_FILE, HFCheckpoint, carry_files, row_window
from megatron_ssu.models.hf_import import DTYPE_NAMES
from megatron_ssu.models.layout import Layout
from megatron_ssu.models.matrix import Matrix
from megatron_ssu.models.shard_writer import ShardWriter, Tensor, head_of

# By a rank that writes: received, assembled, waiting, being written; and two that the allocator has not given back.
PORTIONS_HELD = 6
_TOKEN = ".token"  # the file by which ranks know rank 0's folder


def plan_tensors(
    family: Family, dims: Dims, dtype_of: Callable[[str], str], tied_heads: Sequence[str] = ()
) -> list[Tensor]:
    """All tensors of the new checkpoint, in the model's order.

    `dtype_of`: the stored dtype of a tensor; `tied_heads`: copies of the embedding that are stored as well.
    """
    stored_in: dict[str, list[Matrix]] = {}
    for matrix in family.matrices(dims):
        stored_in.setdefault(row_window(matrix.name)[0], []).append(matrix)
    tensors = [Tensor(name, tuple(found), dtype_of(name)) for name, found in stored_in.items()]
    if dims.tied:
        # Some checkpoints store the tied head as well.
        embedding = next(t for t in tensors if t.matrices[0].kind == "embedding")
        tensors += [Tensor(name, embedding.matrices, embedding.dtype) for name in tied_heads]
    return tensors


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


def spread(ranks: Sequence[int], files: int) -> list[int]:
    """Those of `ranks` that write so many files, one each where there are enough: at even distances, so that every node has its
    part."""
    count = min(files, len(ranks))
    return [ranks[number * len(ranks) // count] for number in range(count)]


def export_model(
    layout: Layout,
    mesh: Mesh,
    source: HFCheckpoint,
    target: Path,
    max_shard_size: int,
    *,
    record: str | None = None,
    further: Callable[[Path], None] = lambda folder: None,
    writers: int | None = None,
) -> None:
    """Write the model to the Hugging Face directory `target`, each tensor in the dtype that `source` stores it in.

    Collective over all ranks. Config, tokenizer and generation config are carried over from `source`. `record` (on rank 0)
    is the text of the export's own record; `further` (on all ranks) writes more into the folder that becomes `target`.
    At most `writers` ranks write, as many as there are files when it is left out; but those of rank 0's node alone where the
    nodes do not share the file system.

    Raises:
        UserError: `target` exists, or cannot be written.
    """
    stored = set(source.names())
    tied_heads = [n for e in layout.family.edges if e.kinds == ("head",) for n in e.tensors if n in stored]
    files = plan_files(plan_tensors(layout.family, layout.dims, source.dtype, tied_heads), max_shard_size)
    _export(layout, mesh, source.directory, target, files, record, further, writers)


def export_as(
    layout: Layout, mesh: Mesh, beside: Path, target: Path, max_shard_size: int, dtype: str, record: str
) -> None:
    """Write a model that no Hugging Face directory has, each tensor as `dtype` ('BF16', 'F32'); as `export_model` otherwise.

    `beside`: the directory of its config and tokenizer.
    """
    files = plan_files(plan_tensors(layout.family, layout.dims, lambda name: dtype), max_shard_size)
    _export(layout, mesh, beside, target, files, record, lambda folder: None, None)


def _export(
    layout: Layout,
    mesh: Mesh,
    beside: Path,
    target: Path,
    files: dict[str, list[Tensor]],
    record: str | None,
    further: Callable[[Path], None],
    writers: int | None,
) -> None:
    partial = target.with_name(f".{target.name}.partial")
    token = on_rank_zero(lambda: _prepare(target, partial))
    ranks = _writing_ranks(partial, token, min(len(files), writers or mesh.world))
    try:
        error = _write_files(Collector(layout, mesh), mesh, files, partial, ranks)
        on_all_ranks(lambda: _raise_failed(error, target))
        further(partial)
        on_rank_zero(lambda: _finish(files, beside, target, partial, record))
    except UserError:
        if mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _prepare(target: Path, partial: Path) -> str:
    """Make the folder; a text that is in it and in no other."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists already and is not overwritten; name another directory or remove it")
    token = secrets.token_hex()
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / _TOKEN).write_text(token)
    except OSError as error:
        raise UserError(f"{partial}: cannot be made: {error.strerror}; name a directory that can be written") from error
    return token


def _writing_ranks(partial: Path, token: str, count: int) -> list[int]:
    """At most `count` ranks of those that see rank 0's folder: on a node's own disk its ranks alone."""
    try:
        sees = (partial / _TOKEN).read_text() == token
    except OSError:
        sees = False
    return spread([rank for rank, can in enumerate(gathered(sees)) if can or rank == 0], count)


def _write_files(
    collect: Collector, mesh: Mesh, files: dict[str, list[Tensor]], folder: Path, ranks: Sequence[int]
) -> OSError | None:
    """Write the files, each by one of `ranks`, which all write at the same time; this rank's first failure. Collective."""
    names = list(files)
    plans = {rank: _portions({name: files[name] for name in names[i :: len(ranks)]}) for i, rank in enumerate(ranks)}
    writer = ShardWriter(folder) if mesh.rank in plans else None
    for step in zip_longest(*plans.values()):
        portions = {rank: portion for rank, portion in zip(plans, step, strict=True) if portion is not None}
        found = collect.exchange({rank: portion.rows for rank, portion in portions.items()})
        if writer is not None and mesh.rank in portions:
            _write(writer, portions[mesh.rank], files, found)
    if writer is None:
        return None
    writer.finish()
    return writer.error


@dataclass(frozen=True)
class _Portion:
    """What is collected and written at a time."""

    file: str
    rows: list[Rows]
    first: bool  # of its file
    last: bool


def _portions(files: dict[str, list[Tensor]]) -> Iterator[_Portion]:
    for name, tensors in files.items():
        wanted = ((matrix, DTYPE_NAMES[tensor.dtype]) for tensor in tensors for matrix in tensor.matrices)
        found = list(portions(wanted, PORTION))
        for number, rows in enumerate(found):
            yield _Portion(name, rows, number == 0, number == len(found) - 1)


def _write(writer: ShardWriter, portion: _Portion, files: dict[str, list[Tensor]], found: list[torch.Tensor]) -> None:
    if portion.first:
        writer.begin(portion.file, files[portion.file])
    writer.write(found)
    if portion.last:
        writer.end()


def _raise_failed(error: OSError | None, target: Path) -> None:
    if error is not None:
        raise UserError(f"{target}: cannot be written: {error.strerror}; nothing was left behind")


def _finish(files: dict[str, list[Tensor]], beside: Path, target: Path, partial: Path, record: str | None) -> None:
    """Everything else, the index last; then the folder takes its name."""
    try:
        for name, tensors in files.items():
            _check_size(partial / name, len(head_of(tensors)) + sum(tensor.nbytes for tensor in tensors))
        (partial / _TOKEN).unlink()
        carry_files(beside, partial)
        if record is not None:
            (partial / EXPORT_RECORD).write_text(record, encoding="utf-8")
        if len(files) > 1:
            total = sum(t.nbytes for part in files.values() for t in part)
            weight_map = {t.name: name for name, part in files.items() for t in part}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (partial / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        if target.exists():
            target.rmdir()
        os.replace(partial, target)
    except OSError as error:
        _raise_failed(error, target)


def _check_size(file: Path, size: int) -> None:
    found = file.stat().st_size
    if found != size:
        raise UserError(
            f"{file}: must be {size} bytes, got {found}, as rank 0 sees it; export to a file system that all nodes share"
        )
