"""Where every element of a Hugging Face tensor lives on the mesh: matrices <-> rows and columns of parameter shards.

Pure arithmetic on sizes and ranks. Import, export, scoring, masking and verifying all read it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_ssu.errors import UserError
from megatron_ssu.models.family import Dims, Entry, Family
from megatron_ssu.models.matrix import Matrix

# Norms that Transformer Engine fuses into the linear layer after them, and their names where they are modules of their own.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


_LOCAL_EXPERT = re.compile(r"\blocal_experts\.(\d+)\.")


@dataclass(frozen=True)
class Run:
    """`count` consecutive rows of a matrix, from `matrix_row`, that are rows of the shard from `shard_row`."""

    shard_row: int
    matrix_row: int
    count: int


@dataclass(frozen=True)
class Piece:
    """The part of one matrix that one parameter shard holds: rows in runs, and columns [col_start, col_stop).

    The runs' matrix rows are consecutive, so the part is one rectangle of the matrix. For 1-D tensors the rows are elements
    and the columns [0, 1). Without runs it is no part at all, of 0 rows.
    """

    matrix: Matrix
    runs: tuple[Run, ...]
    col_start: int
    col_stop: int

    @property
    def row_start(self) -> int:
        return self.runs[0].matrix_row if self.runs else 0

    @property
    def row_stop(self) -> int:
        return self.runs[-1].matrix_row + self.runs[-1].count if self.runs else 0

    @property
    def rows(self) -> int:
        return self.row_stop - self.row_start

    @property
    def index(self) -> tuple[slice, ...]:
        """The rectangle as an index into the matrix."""
        rows = slice(self.row_start, self.row_stop)
        return (rows,) if len(self.matrix.shape) == 1 else (rows, slice(self.col_start, self.col_stop))

    def within(self, first: int, stop: int) -> Piece:
        """The part of the piece in rows [first, stop) of the matrix; of 0 rows where they do not meet."""
        runs = []
        for run in self.runs:
            low, high = max(run.matrix_row, first), min(run.matrix_row + run.count, stop)
            if low < high:
                runs.append(Run(run.shard_row + low - run.matrix_row, low, high - low))
        return replace(self, runs=tuple(runs))

    def portions(self, elements: int) -> Iterator[Piece]:
        """Parts of consecutive rows, each of at most `elements` elements, but of one row at least."""
        step = max(1, elements // max(1, self.col_stop - self.col_start))
        for first in range(self.row_start, self.row_stop, step):
            yield self.within(first, first + step)


def put(shard: torch.Tensor, piece: Piece, part: torch.Tensor) -> None:
    """Write `part` [rows, cols] of a matrix into the rows of `shard` that belong to it."""
    for run in piece.runs:
        start = run.matrix_row - piece.row_start
        shard[run.shard_row : run.shard_row + run.count].copy_(part[start : start + run.count])


def take(shard: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The rows of `shard` that belong to the piece's matrix, in the matrix's order: [rows, cols]; a view where it can be."""
    parts = [shard[run.shard_row : run.shard_row + run.count] for run in piece.runs] or [shard[:0]]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def pieces(
    entry: Entry, dims: Dims, layer: int | None, rank: int, size: int, vocab_rows: int, expert: int | None = None
) -> tuple[Piece, ...]:
    """What the shard of `entry` on tensor-parallel rank `rank` of `size` holds; `vocab_rows` is the padded vocabulary."""
    matrices = entry.matrices(dims, layer, expert)
    if entry.form == "qkv":
        return _qkv_pieces(matrices, dims, rank, size)
    found, shard_row = [], 0
    for matrix in matrices:
        rows, cols = matrix.shape[0], matrix.shape[1] if len(matrix.shape) == 2 else 1
        first, stop, col_start, col_stop = 0, rows, 0, cols
        if entry.split == 0:
            share = (vocab_rows if entry.form == "vocab" else rows) // size
            first, stop = min(rows, rank * share), min(rows, (rank + 1) * share)
        elif entry.split == 1:
            col_start, col_stop = rank * cols // size, (rank + 1) * cols // size
        if stop > first:
            found.append(Piece(matrix, (Run(shard_row, first, stop - first),), col_start, col_stop))
            shard_row += stop - first
    return tuple(found)


def _qkv_pieces(matrices: Sequence[Matrix], dims: Dims, rank: int, size: int) -> tuple[Piece, ...]:
    """Query group by query group: the group's query heads, its key head, its value head."""
    heads = [dims.heads // dims.groups * dims.head, dims.head, dims.head]
    share = dims.groups * sum(heads) // size  # rows of a rank; with more ranks than groups a part of a group
    first, stop = rank * share, (rank + 1) * share
    runs: list[list[Run]] = [[] for _ in matrices]
    start = 0  # of a head's rows, over all ranks
    for group in range(dims.groups):
        for found, rows in zip(runs, heads, strict=True):
            low, high = max(start, first), min(start + rows, stop)
            if low < high:
                found.append(Run(low - first, group * rows + low - start, high - low))
            start += rows
    return tuple(
        Piece(matrix, tuple(found), 0, matrix.shape[1] if len(matrix.shape) == 2 else 1)
        for matrix, found in zip(matrices, runs, strict=True)
        if found
    )


@dataclass(frozen=True)
class LocalParam:
    """A parameter of this rank and the matrices in it."""

    name: str  # within its chunk
    param: torch.nn.Parameter
    matrices: tuple[Matrix, ...]  # those in it on all tensor-parallel ranks
    pieces: tuple[
        Piece, ...
    ]  # this rank's; a shard may lack matrices, and hold none where all its rows pad the vocabulary
    peers: tuple[tuple[Piece, ...], ...]  # of every tensor-parallel rank
    split: int | None
    primary: bool  # False: a second copy (the tied head of the last pipeline stage)
    expert: bool = False  # held by the ranks of an expert's own data-parallel group

    @property
    def parts(self) -> tuple[Piece, ...]:
        """A piece of each of `matrices`, of 0 rows where this rank's shard lacks the matrix: what collective work goes by."""
        own = {piece.matrix.name: piece for piece in self.pieces}
        none = {m.name: Piece(m, (), 0, m.shape[1] if len(m.shape) == 2 else 1) for m in self.matrices}
        return tuple(own.get(name, piece) for name, piece in none.items())


class Layout:
    """All parameters of this rank's model chunks, each with its matrices.

    Chunks are GPTModels, bare or in wrappers that name what they wrap `module` (Float16Module, DDP). Raises UserError for a
    parameter that the family's table does not know.
    """

    def __init__(
        self,
        family: Family,
        dims: Dims,
        chunks: Sequence[torch.nn.Module],
        tensor_rank: int,
        tensor_size: int,
        vocab_rows: int,
    ) -> None:
        self.family, self.dims = family, dims
        self.params: list[LocalParam] = []
        for chunk in map(unwrapped, chunks):
            for name, param in chunk.named_parameters():
                entry, layer, expert = _find(family, dims, chunk, name)
                tied_copy = entry.kinds == ("head",) and dims.tied
                source = _embedding(family) if tied_copy else entry
                ranks = range(tensor_size if source.split is not None else 1)
                peers = [pieces(source, dims, layer, rank, len(ranks), vocab_rows, expert) for rank in ranks]
                self.params.append(
                    LocalParam(
                        name=name,
                        param=param,
                        matrices=source.matrices(dims, layer, expert),
                        pieces=peers[tensor_rank % len(peers)],
                        peers=tuple(peers),
                        split=entry.split,
                        primary=not tied_copy,
                        expert=expert is not None,
                    )
                )

    def __iter__(self) -> Iterator[LocalParam]:
        return iter(self.params)


def _embedding(family: Family) -> Entry:
    return next(e for e in family.edges if e.kinds == ("embedding",))


def unwrapped(chunk: Any) -> Any:
    """The GPTModel within megatron's wrappers."""
    while isinstance(getattr(chunk, "module", None), torch.nn.Module):
        chunk = chunk.module
    return chunk


def _find(family: Family, dims: Dims, chunk: Any, name: str) -> tuple[Entry, int | None, int | None]:
    """The table's entry for a parameter of a GPTModel chunk; its layer and expert counted over the whole model from 0."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
    if match:
        module = chunk.decoder.layers[int(match[1])]
        layer, inner = module.layer_number - 1, FUSED_NORMS.get(match[2], match[2])
        local = _LOCAL_EXPERT.search(inner)
        expert = module.mlp.local_expert_indices[int(local[1])] if local else None
        inner = _LOCAL_EXPERT.sub("local_experts.{expert}.", inner)
        for entry in family.present(dims, layer):
            if entry.param in (inner, match[2]):
                return entry, layer, expert
    for entry in family.edges:
        if entry.param == name:
            return entry, None, None
    raise UserError(
        f"megatron's parameter {name} must be one that a {family.name} model has; build the GPTModel as the Hugging Face "
        "config says, without biases and further layers"
    )
