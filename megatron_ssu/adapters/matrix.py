"""The adapter of one logical matrix on a tensor-parallel rank.

    base layer        A [r, I]              B [O, r]             magnitude [O] (DoRA)
    column-parallel   on all ranks alike    the rank's rows      the rank's rows
    row-parallel      the rank's columns    on all ranks alike   on all ranks alike

Each is a parameter with megatron's marks: split ones are tensor-parallel, so that the gradient norm counts every element once;
under sequence parallelism replicated ones see the rank's part of every sequence, and their mark lets megatron sum their
gradients over the tensor-parallel ranks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor

from megatron_ssu.adapters.settings import AdapterSettings
from megatron_ssu.models.layout import LocalParam, Piece, Run, put, take
from megatron_ssu.models.matrix import Matrix
from megatron_ssu.shield.mask import Mask

BLOCK = 1 << 24  # elements of a weight whose row norms are computed at a time, in fp32


@dataclass(frozen=True, eq=False)
class Part:
    """A tensor of an adapter: what it is on all ranks, and this rank's part of it."""

    matrix: Matrix  # the whole tensor, under its name in checkpoints
    piece: Piece  # this rank's part
    param: torch.nn.Parameter
    split: bool  # over tensor-parallel ranks; else all of them hold the same

    def sharded(self) -> ShardedTensor:
        """As dist_checkpointing takes it: the parameter itself, in its place in the whole tensor."""
        local, whole = tuple(self.param.shape), self.matrix.shape
        rank = 0 if self.split else parallel_state.get_tensor_model_parallel_rank()
        return ShardedTensor(
            key=f"adapter.{self.matrix.name}",
            data=self.param,
            dtype=self.param.dtype,
            local_shape=local,
            global_shape=whole,
            global_offset=tuple(s.start for s in self.piece.index),
            axis_fragmentations=tuple(a // b for a, b in zip(whole, local, strict=True)),
            replica_id=(0, rank, parallel_state.get_data_parallel_rank(with_context_parallel=True)),
        )


@dataclass(frozen=True, eq=False)
class AdaptedMatrix:
    """A matrix's adapter on this rank; `piece` says where the matrix is in the layer's weight."""

    piece: Piece
    a: Part
    b: Part
    magnitude: Part | None  # fp32: its quotient with the norm must be 1 before the first step
    open_columns: Tensor | None  # bool [I / TP] or [I]: all others of A are zero; None: every column trains
    open_rows: Tensor | None  # bool [O / TP] or [O]: all others of B are zero

    @classmethod
    def of(
        cls,
        local: LocalParam,
        piece: Piece,
        settings: AdapterSettings,
        mask: Mask | None,
        *,
        sequence_parallel: bool,
    ) -> AdaptedMatrix:
        """A new adapter, which changes nothing yet, for the matrix of `piece` in the weight of `local`.

        `mask`, by column or row, or None: the elements of the matrix that are to keep their bits.
        """
        maker = _Maker(local, piece, sequence_parallel)
        rank, (rows, columns) = settings.rank, piece.matrix.shape
        whole = draw(piece.matrix.name, (rank, columns), settings.seed)
        start = whole[:, piece.col_start : piece.col_stop]
        open_columns, open_rows = _open(mask, piece, local.param.device)
        if open_columns is not None:
            start = start * open_columns.cpu()
        weight, split = local.param, local.split == 1
        a = maker.part("lora_A", (rank, columns), (0, rank), (piece.col_start, piece.col_stop), start, split=split)
        zero = torch.zeros(piece.rows, rank)
        b = maker.part("lora_B", (rows, rank), (piece.row_start, piece.row_stop), (0, rank), zero, split=not split)
        found = cls(piece, a, b, None, open_columns, open_rows)
        if not settings.dora:
            return found
        norms = found.row_norms(weight, settings.scale)
        magnitude = maker.part(
            "lora_magnitude_vector", (rows,), (piece.row_start, piece.row_stop), (0, 1), norms, split=not split
        )
        return cls(piece, a, b, magnitude, open_columns, open_rows)

    def parts(self) -> Iterator[Part]:
        """A, B and, if there is one, the magnitude."""
        yield from (part for part in (self.a, self.b, self.magnitude) if part is not None)

    @property
    def down(self) -> Tensor:
        """A, whose frozen columns have no gradient."""
        return self.a.param if self.open_columns is None else self.a.param * self.open_columns.to(self.a.param.dtype)

    @property
    def up(self) -> Tensor:
        """B, whose frozen rows have no gradient."""
        return self.b.param if self.open_rows is None else self.b.param * self.open_rows[:, None].to(self.b.param.dtype)

    @torch.no_grad()
    def row_norms(self, weight: Tensor, scale: float) -> Tensor:
        """fp32 [rows of the piece]: L2 norms of the whole rows of W + scale B A. Collective over tensor-parallel ranks where
        they split the rows."""
        own, a = take(weight, self.piece), self.a.param.float()
        step = max(1, BLOCK // own.shape[1])
        squares = torch.empty(len(own), dtype=torch.float32, device=own.device)
        for first in range(0, len(own), step):
            block = slice(first, first + step)
            squares[block] = (
                torch.addmm(own[block].float(), self.b.param[block].float(), a, alpha=scale).square().sum(1)
            )
        if self.a.split:
            dist.all_reduce(squares, group=parallel_state.get_tensor_model_parallel_group())
        return squares.sqrt_().clamp_(min=torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def merge(self, weight: Tensor, scale: float) -> None:
        """Write W' into `weight`: computed in fp32, rounded once. Frozen elements keep their bits."""
        own = take(weight, self.piece)
        merged = torch.addmm(own.float(), self.b.param.float(), self.a.param.float(), alpha=scale)
        if self.magnitude is not None:
            merged.mul_((self.magnitude.param / self.row_norms(weight, scale))[:, None])
        merged = merged.to(weight.dtype)
        # Adding zero would do, but for -0.0 and NaN.
        if self.open_columns is not None:
            merged = torch.where(self.open_columns, merged, own)
        if self.open_rows is not None:
            merged = torch.where(self.open_rows[:, None], merged, own)
        put(weight, self.piece, merged)


def draw(name: str, shape: tuple[int, int], seed: int) -> Tensor:
    """The start of A [r, I] for the matrix `name`, fp32 on CPU, the same on every mesh: uniform within 1 / sqrt(I), which is
    PEFT's kaiming_uniform with a = sqrt(5)."""
    number = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(number))


def _open(mask: Mask | None, piece: Piece, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """bool: the piece's trainable columns, or rows."""
    if mask is None or mask.frozen_units == 0:
        return None, None
    if mask.granularity not in ("column", "row"):
        raise ValueError(
            f"{piece.matrix.name}: a mask by {mask.granularity} has no adapter; it must be by column or row"
        )
    if mask.granularity == "column":
        return torch.from_numpy(~mask.bits(piece.col_start, piece.col_stop)).to(device), None
    return None, torch.from_numpy(~mask.bits(piece.row_start, piece.row_stop)).to(device)


@dataclass(frozen=True)
class _Maker:
    """Makes the parameters of one matrix's adapter."""

    local: LocalParam
    base: Piece
    sequence_parallel: bool

    def part(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: tuple[int, int],
        columns: tuple[int, int],
        start: Tensor,
        *,
        split: bool,
    ) -> Part:
        """The part [rows] x [columns] of a tensor of `shape`, which begins as `start`: of the weight's dtype, or fp32 where it
        has one dimension."""
        matrix, weight = self.base.matrix, self.local.param
        whole = Matrix(f"{matrix.name.removesuffix('.weight')}.{name}", shape, matrix.layer, matrix.kind)
        piece = Piece(whole, (Run(0, rows[0], rows[1] - rows[0]),), *columns)
        dtype = weight.dtype if len(shape) == 2 else torch.float32
        param = torch.nn.Parameter(start.to(weight.device, dtype, copy=True).contiguous())
        if split:
            dim = 1 if len(shape) == 2 and columns[1] - columns[0] < shape[1] else 0
            set_tensor_model_parallel_attributes(param, is_parallel=True, dim=dim, stride=1)
        elif self.sequence_parallel:
            param.sequence_parallel = True  # type: ignore[attr-defined]
        return Part(whole, piece, param, split)
