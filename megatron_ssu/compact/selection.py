"""Which outputs or inputs of a layer a compact parameter's rows or columns belong to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_ssu.models.layout import Piece
from megatron_ssu.ops.kernels import ColumnGather, gather_columns

_WORD = 8  # bytes of an int64


class Selection(Protocol):
    """Picks from a tensor that has all N outputs (or inputs) of a layer in one dimension."""

    def columns(self, x: Tensor) -> Tensor:
        """x [T, N] -> [T, selected]."""

    def rows(self, x: Tensor) -> Tensor:
        """x [N, T] -> [selected, T]."""


class Everything:
    """All of them."""

    def columns(self, x: Tensor) -> Tensor:
        return x

    def rows(self, x: Tensor) -> Tensor:
        return x


class Picked:
    """Those of `index`, then zeros up to `width`."""

    def __init__(self, index: Tensor, total: int, width: int) -> None:
        """`index`: int64 [K] ascending within [0, total)."""
        self.index, self.width = index, width
        self.gather = ColumnGather(index, total, width)

    def columns(self, x: Tensor) -> Tensor:
        return self.gather(x.contiguous())

    def rows(self, x: Tensor) -> Tensor:
        whole = x.new_empty((self.width, x.shape[1]))
        torch.index_select(x, 0, self.index, out=whole[: len(self.index)])
        whole[len(self.index) :] = 0
        return whole


@dataclass(frozen=True)
class Blocks:
    """[first, first + count) of each of `groups` equal blocks: the rows of one logical matrix in a fused weight."""

    groups: int
    block: int
    first: int
    count: int

    @classmethod
    def of(cls, piece: Piece, shard_rows: int) -> Blocks:
        """Raises ValueError where the piece's runs are not evenly spread over the `shard_rows` rows."""
        runs = piece.runs
        block = runs[1].shard_row - runs[0].shard_row if len(runs) > 1 else shard_rows
        first, count = runs[0].shard_row, runs[0].count
        if [(first + i * block, count) for i in range(len(runs))] != [(run.shard_row, run.count) for run in runs]:
            raise ValueError(f"{piece.matrix.name}: rows must be spread evenly over their shard")
        return cls(len(runs), block, first, count)

    def columns(self, x: Tensor) -> Tensor:
        return self._of(x, 1)

    def rows(self, x: Tensor) -> Tensor:
        return self._of(x, 0)

    def _of(self, x: Tensor, dim: int) -> Tensor:
        if self.groups == 1:
            return x.narrow(dim, self.first, self.count)
        parts, each = (self.block, self.first, self.count), _WORD // x.element_size()
        scale = each if dim == 1 else 1
        if _is_words(x, each) and not any(size % scale for size in parts):
            return _blocks(x.view(torch.int64), dim, self.groups, *(size // scale for size in parts)).view(x.dtype)
        return _blocks(x, dim, self.groups, *parts)


def _blocks(x: Tensor, dim: int, groups: int, block: int, first: int, count: int) -> Tensor:
    blocks: Tensor = x.unflatten(dim, (groups, block))
    return blocks.narrow(dim + 1, first, count).flatten(dim, dim + 1)


def _is_words(x: Tensor, each: int) -> bool:
    """Whether x [R, C] can be looked at as int64 [R, C / each], of which a GPU copies more at a time."""
    return x.is_contiguous() and x.shape[1] % each == 0 and x.storage_offset() % each == 0


class Workspace:
    """Memory on the CPU for operands that the next GEMM reads, kept from one to the next.

    glibc would take it from the system anew, page by page, or tear holes into its heap. On CUDA torch keeps what is freed.
    """

    def __init__(self) -> None:
        self._held: dict[torch.dtype, Tensor] = {}

    def like(self, x: Tensor, widths: Sequence[int]) -> list[Tensor] | None:
        """Tensors [T, width] of the dtype of x [T, N], in place of those of the last call; None where new ones will do."""
        if x.is_cuda:
            return None
        sizes = [x.shape[0] * width for width in widths]
        held = self._held.get(x.dtype)
        if held is None or held.numel() < sum(sizes):
            held = self._held[x.dtype] = x.new_empty(sum(sizes))
        return [part.view(-1, width) for part, width in zip(held[: sum(sizes)].split(sizes), widths, strict=True)]


class Together:
    """Selections from one tensor, which is read once for all that pick columns of it."""

    def __init__(self, selections: Sequence[Selection], workspace: Workspace) -> None:
        self._selections, self._workspace = tuple(selections), workspace
        self._gathers = [selection.gather for selection in selections if isinstance(selection, Picked)]
        self._widths = [gather.width for gather in self._gathers]

    def __iter__(self) -> Iterator[Selection]:
        return iter(self._selections)

    def columns(self, x: Tensor) -> list[Tensor]:
        """x [T, N] -> [T, selected] of each selection; to be read before the workspace is used again."""
        if not self._gathers:
            return [own.columns(x) for own in self]
        picked = iter(gather_columns(self._gathers, x.contiguous(), self._workspace.like(x, self._widths)))
        return [next(picked) if isinstance(own, Picked) else own.columns(x) for own in self]
