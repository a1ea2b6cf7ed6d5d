"""The trainable part of one logical matrix as a parameter of its own.

    shield by     parameter P        gradient
    column        [O, K16]           dY^T X[:, trainable columns]
    row           [R16, I]           dY[:, trainable rows]^T X
    element       [1, n16]           the trainable elements of dY^T X
    nothing       [O, I]             dY^T X; the matrix shares a weight with a shielded one

O rows and I columns are those of the matrix on a tensor-parallel rank, K, R and n count what trains of them on the rank where
that is most: P has one shape on all of them. megatron-core sums some gradients over tensor-parallel ranks after the data-
parallel reduction, and takes for granted that all of them divide their gradient buffers alike. The counts are padded to a
multiple of 16, so that rows of 16-bit elements start where fast GEMM kernels and FP8 want them. Padding is zero and so is its
gradient: Adam and weight decay leave it so.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_ssu.compact.rules import padded
from megatron_ssu.compact.selection import Blocks, Everything, Picked, Selection
from megatron_ssu.compact.shards import RowRun, ShardMask
from megatron_ssu.models.layout import LocalParam, Piece
from megatron_ssu.models.matrix import Matrix
from megatron_ssu.shield.mask import Mask

Kind = Literal["column", "row", "element", "whole"]


@dataclass(frozen=True, eq=False)
class CompactMatrix:
    """One logical matrix's trainable part on this rank; see the module docstring."""

    part: Part
    param: torch.nn.Parameter  # P, of the weight's dtype
    mask: ShardMask  # of the whole weight: this matrix's trainable elements, in P's order
    output: Selection  # the weight's outputs that P's rows belong to
    input: Selection  # the weight's inputs that P's columns belong to

    @classmethod
    def of(cls, weight: torch.nn.Parameter, part: Part) -> CompactMatrix:
        """With P as the weight is now."""
        shape = (weight.shape[0], weight.shape[1])
        param = torch.nn.Parameter(torch.zeros(part.shape, dtype=weight.dtype, device=weight.device))
        mask, selections = part.mask(shape).to(weight.device), part.selections(shape, weight.device)
        found = cls(replace(part, frozen=None), param, mask, *selections)  # the mask has these in a bit each
        found.read(weight)
        return found

    @property
    def values(self) -> Tensor:
        """P without the padding at its end, flat, as `mask` takes it."""
        return self.param.detach().view(-1)[: self.mask.size]

    def read(self, weight: Tensor) -> None:
        """P becomes what the trainable elements of `weight` are."""
        self.mask.gather(weight.detach().view(-1), self.values)

    def write(self, weight: Tensor) -> None:
        """The trainable elements of `weight` become what P is; the others keep their bits."""
        self.mask.scatter(self.values, weight.detach().view(-1))


@dataclass(frozen=True, eq=False)
class Part:
    """What trains of one logical matrix on a tensor-parallel rank."""

    kind: Kind
    matrix: Matrix
    piece: Piece | None  # None where the rank has no row of the matrix
    shape: tuple[int, int]  # of P, on all ranks
    real: tuple[int, int]  # rows and columns of P without padding
    whole: tuple[int, int]  # shape of the trainable part over all ranks; [O, I] for elements
    offset: tuple[int, int]  # of this rank's in it
    index: np.ndarray | None = None  # int64: trainable columns, or rows, of the weight on this rank
    frozen: np.ndarray | None = None  # bool [rows, columns] of the piece, for elements

    def selections(self, shape: tuple[int, int], device: torch.device) -> tuple[Selection, Selection]:
        """Of the outputs and inputs of a weight of `shape`."""
        input: Selection = Everything()
        rows = self.index if self.kind == "row" else _shard_rows(self.piece)
        if self.kind == "column":
            input = Picked(torch.from_numpy(self.index).to(device), shape[1], self.shape[1])
        if self.kind != "row" and self.piece is not None and self.real[0] == self.shape[0]:
            return Blocks.of(self.piece, shape[0]), input
        return Picked(torch.from_numpy(rows).to(device), shape[0], self.shape[0]), input

    def mask(self, shape: tuple[int, int]) -> ShardMask:
        """What trains of this matrix in a weight of `shape`, on CPU."""
        if self.kind == "element":
            frozen = torch.ones(shape, dtype=torch.bool)
            if self.frozen is not None:
                frozen[torch.from_numpy(_shard_rows(self.piece))] = torch.from_numpy(self.frozen)
            return ShardMask.from_bits(shape, frozen)
        trains = np.zeros(shape[0], dtype=bool)
        trains[self.index if self.kind == "row" else _shard_rows(self.piece)] = True
        nothing = torch.empty(0, dtype=torch.int64)
        if self.kind == "column":
            return ShardMask.from_patterns(
                shape, row_runs(trains), [nothing, torch.from_numpy(self.index)], stride=self.shape[1]
            )
        return ShardMask.from_patterns(shape, row_runs(trains), [nothing, None])


def part_of(local: LocalParam, matrix: Matrix, mask: Mask | None) -> Part | None:
    """What trains of `matrix`, which is in the weight of `local` and shielded by `mask`, or not at all; None for nothing."""
    peers = [next((p for p in peer if p.matrix == matrix), None) for peer in local.peers]
    piece = next((p for p in local.pieces if p.matrix == matrix), None)
    held = [p for p in peers if p is not None]
    rows, columns = max(p.rows for p in held), max(p.col_stop - p.col_start for p in held)
    own = piece.rows if piece is not None else 0
    total = (matrix.shape[0], matrix.shape[1])
    corner = (piece.row_start, piece.col_start) if piece is not None else (0, 0)
    if mask is None or mask.frozen_units == 0:
        return Part("whole", matrix, piece, (rows, columns), (own, columns), total, corner)
    trainable = mask.units - mask.frozen_units
    if trainable == 0:
        return None
    if mask.granularity == "element":
        full = mask.full()
        most = max(full[p.index].size - int(full[p.index].sum()) for p in held)
        mine = None if piece is None else np.ascontiguousarray(full[piece.index])
        count = 0 if mine is None else mine.size - int(mine.sum())
        return Part("element", matrix, piece, (1, padded(most)), (1, count), total, corner, frozen=mine)
    by_column = mask.granularity == "column"
    most = max(int(np.count_nonzero(~_units(p, mask))) for p in held)
    if piece is None:
        found, before = np.empty(0, dtype=np.int64), 0
    else:
        found = np.flatnonzero(~_units(piece, mask))
        before = int(np.count_nonzero(~mask.bits(0, corner[1] if by_column else corner[0])))
    if by_column:
        whole, offset = (total[0], trainable), (corner[0], before)
        return Part("column", matrix, piece, (rows, padded(most)), (own, found.size), whole, offset, found)
    whole, offset = (trainable, total[1]), (before, corner[1])
    return Part(
        "row", matrix, piece, (padded(most), columns), (found.size, columns), whole, offset, _shard_rows(piece)[found]
    )


def row_runs(state: np.ndarray) -> list[RowRun]:
    """Runs of rows of like `state` (bool [R]): pattern 1 where it is True, else 0."""
    cuts = np.flatnonzero(np.diff(state)) + 1
    bounds = [0, *cuts.tolist(), state.size]
    return [RowRun(a, b, int(state[a])) for a, b in itertools.pairwise(bounds)]


def _shard_rows(piece: Piece | None) -> np.ndarray:
    """int64 [rows]: the shard's row of each row of the piece, ascending."""
    if piece is None:
        return np.empty(0, dtype=np.int64)
    return np.concatenate([np.arange(run.shard_row, run.shard_row + run.count) for run in piece.runs])


def _units(piece: Piece, mask: Mask) -> np.ndarray:
    """bool: which columns, or rows, of the piece are frozen."""
    if mask.granularity == "column":
        return mask.bits(piece.col_start, piece.col_stop)
    return mask.bits(piece.row_start, piece.row_stop)
