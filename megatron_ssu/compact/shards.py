"""Which elements of a weight shard are trainable, without an index as long as the shard.

A shard [R, C] is row-major; a 1-D parameter [n] is [1, n]. Rows of a fused parameter belong to several logical matrices,
each with column numbers of its own:

    runs      RowRun(0, 4096, 0), RowRun(4096, 8192, 1)   rows [start, stop) use patterns[pattern]
    patterns  [int64 [K0], None]                          trainable columns, ascending; None: all; empty: row frozen

The trainable elements, in the order of the shard, make up its compact tensor. A row with listed columns takes `stride`
elements there: its trainable elements, then padding; a row of pattern None takes C, and a frozen one none.
Element masks keep one bit per element, and a running count every 8192 elements; their compact tensors have no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from megatron_ssu.ops import kernels
from megatron_ssu.ops.kernels import BLOCK, TILE_COLUMNS, TILE_ROWS

Pattern: TypeAlias = Tensor | None  # trainable columns, integers in ascending order; None for all of them

_ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.int64)


@dataclass(frozen=True)
class RowRun:
    """Rows [start, stop) of the shard use `patterns[pattern]`. Runs cover [0, R) in order."""

    start: int
    stop: int
    pattern: int


@dataclass(frozen=True, eq=False)
class ShardMask:
    """The trainable elements of a shard [R, C] and their places in its compact tensor [size]."""

    shape: tuple[int, int]
    numel: int  # trainable elements
    size: int  # elements of the compact tensor, padding included
    elements: bool  # an element mask; else pieces
    tiles: int  # CUDA thread blocks that the pieces take
    host: Tensor  # CPU int64: pieces [P, 11] (columns: kernels.DENSE ...), or running counts [blocks + 1]
    index: Tensor  # the same on `device`
    bits: Tensor  # uint8 on `device`, 1 = trainable, lowest bit first: each pattern's columns, or the shard's elements
    columns: Tensor  # int32 on `device`: the trainable columns of all patterns in use

    @property
    def length(self) -> int:
        """Elements of the shard."""
        return self.shape[0] * self.shape[1]

    @property
    def frozen(self) -> int:
        """Frozen elements of the shard."""
        return self.length - self.numel

    @property
    def device(self) -> torch.device:
        return self.index.device

    @property
    def nbytes(self) -> int:
        """Bytes that this mask holds, host copies included."""
        tensors = [self.host, self.bits, self.columns]
        if self.index is not self.host:
            tensors.append(self.index)
        return sum(t.numel() * t.element_size() for t in tensors)

    @classmethod
    def from_patterns(
        cls, shape: Sequence[int], runs: Sequence[RowRun], patterns: Sequence[Pattern], stride: int = 0
    ) -> ShardMask:
        """The mask of rows that share column sets, on CPU; without a `stride` rows have no padding.

        Raises ValueError when runs do not cover the rows in order, a pattern is not ascending within [0, C), or
        `stride` is too small for it.
        """
        rows, width = _check_shape(shape)
        if [run.start for run in runs] != [0, *(run.stop for run in runs)][:-1] or (
            runs[-1].stop if runs else 0
        ) != rows:
            raise ValueError(f"runs must cover rows 0 to {rows} in order")
        builder = _Builder(width, stride)
        checked: dict[int, np.ndarray | None] = {}
        for run in runs:
            if run.pattern not in checked:
                checked[run.pattern] = _check_pattern(patterns[run.pattern], width, stride)
            builder.add(run, checked[run.pattern])
        return builder.build((rows, width))

    @classmethod
    def from_bits(cls, shape: Sequence[int], frozen: Tensor | np.ndarray) -> ShardMask:
        """The mask of single elements, on CPU.

        `frozen` is bool [R, C] (or flat), or uint8 [ceil(R * C / 8)] with the lowest bit first; True is frozen. Raises
        ValueError on another size or dtype.
        """
        rows, width = _check_shape(shape)
        length = rows * width
        array = frozen.detach().cpu().numpy() if isinstance(frozen, Tensor) else np.asarray(frozen)
        array = array.reshape(-1)
        if array.dtype == np.bool_ and array.size == length:
            packed = np.packbits(array, bitorder="little")
        elif array.dtype == np.uint8 and array.size == (length + 7) // 8:
            packed = array
        else:
            raise ValueError(
                f"frozen elements of a shard {(rows, width)} are bool [{length}] or packed uint8 "
                f"[{(length + 7) // 8}], not {array.dtype} [{array.size}]"
            )
        bits = np.zeros((length + 63) // 64 * 8 + kernels.PADDING, dtype=np.uint8)
        np.invert(packed, out=bits[: packed.size])
        if length % 8:
            bits[packed.size - 1] &= (1 << length % 8) - 1
        counts = _running_counts(bits[: -kernels.PADDING])
        numel, empty = int(counts[-1]), torch.empty(0, dtype=torch.int32)
        return cls((rows, width), numel, numel, True, 0, counts, counts, torch.from_numpy(bits), empty)

    def to(self, device: torch.device | str) -> ShardMask:
        """The same mask with its index on `device`."""
        if torch.device(device) == self.device:
            return self
        index = self.host.to(device)
        return replace(self, index=index, bits=self.bits.to(index.device), columns=self.columns.to(index.device))

    def gather(self, src: Tensor, out: Tensor) -> None:
        """Copy the trainable elements of `src` into `out`, to the bit; padding in `out` is not written.

        `src` flat [R * C] and `out` flat [size] have one dtype, of 2 or 4 bytes. Raises ValueError on other sizes or
        dtypes, on tensors that are not contiguous and on ones that are not on the mask's device.
        """
        kernels.gather(self, src, out)

    def scatter(self, values: Tensor, dst: Tensor) -> None:
        """Copy `values` [size] into the trainable elements of `dst` [R * C], to the bit. Neither padding in `values`
        nor frozen elements of `dst` matter or change. Sizes, dtypes and errors are those of `gather`."""
        kernels.scatter(self, values, dst)

    def expand(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """[size] -> [R * C] of the same dtype, with `fill` in frozen places."""
        full = torch.full((self.length,), fill, dtype=values.dtype, device=self.device)
        self.scatter(values, full)
        return full

    def compact(self, full: Tensor) -> Tensor:
        """[R * C] -> [size] of the same dtype, padding zero."""
        new = torch.empty if self.size == self.numel else torch.zeros
        out = new(self.size, dtype=full.dtype, device=self.device)
        self.gather(full, out)
        return out


class _Builder:
    """Collects pieces in the order of the shard."""

    def __init__(self, width: int, stride: int) -> None:
        self.width = width
        self.stride = stride
        self.pieces: list[list[int]] = []
        self.numel = self.out = self.cost = self.tile = 0
        self.used: dict[int, tuple[int, int]] = {}  # pattern -> offset in the column list, offset in the bits (bytes)
        self.columns: list[np.ndarray] = []
        self.bits: list[np.ndarray] = []

    def add(self, run: RowRun, columns: np.ndarray | None) -> None:
        """Rows that all have these trainable columns."""
        if run.start == run.stop or self.width == 0:
            return
        if columns is None:
            self._dense(run.start * self.width, (run.stop - run.start) * self.width)
        elif columns.size:
            self._rows(run, columns)

    def _dense(self, src: int, length: int) -> None:
        last = self.pieces[-1] if self.pieces else None
        if last and last[kernels.DENSE] and last[kernels.SRC] + last[kernels.WIDTH] == src:
            self.pieces.pop()  # one longer stretch with the one before it
            self.numel -= last[kernels.COUNT]
            src, length = last[kernels.SRC], length + last[kernels.WIDTH]
            self.out, self.cost, self.tile = last[kernels.OUT], last[kernels.COST], last[kernels.TILE]
        self._append([1, src, 1, self.out, 0, length, length, length, 0], -(-length // (TILE_ROWS * TILE_COLUMNS)))

    def _rows(self, run: RowRun, columns: np.ndarray) -> None:
        if run.pattern not in self.used:
            self.used[run.pattern] = (sum(c.size for c in self.columns), sum(b.size for b in self.bits))
            self.columns.append(columns.astype(np.int32))
            self.bits.append(kernels.column_bits(columns, self.width))
        listed, packed = self.used[run.pattern]
        rows, count = run.stop - run.start, columns.size
        stride = self.stride or count
        tiles = -(-rows // TILE_ROWS) * -(-count // TILE_COLUMNS)
        self._append([0, run.start * self.width, rows, self.out, packed * 8, self.width, count, stride, listed], tiles)

    def _append(self, piece: list[int], tiles: int) -> None:
        self.pieces.append([*piece, self.cost, self.tile])
        rows = piece[kernels.ROWS]
        self.numel += rows * piece[kernels.COUNT]
        self.out += rows * piece[kernels.STRIDE]
        self.cost += rows * piece[kernels.WIDTH]
        self.tile += tiles

    def build(self, shape: tuple[int, int]) -> ShardMask:
        pieces = torch.tensor(self.pieces, dtype=torch.int64).view(-1, 11)
        bits = torch.from_numpy(np.concatenate([*self.bits, np.zeros(kernels.PADDING, dtype=np.uint8)]))
        columns = torch.from_numpy(np.concatenate([*self.columns, np.empty(0, dtype=np.int32)]))
        return ShardMask(shape, self.numel, self.out, False, self.tile, pieces, pieces, bits, columns)


def _check_shape(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) not in (1, 2):
        raise ValueError(f"a shard has one or two dimensions, not {tuple(shape)}")
    rows, width = (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])
    if width >= 1 << 31:
        raise ValueError(f"a row of {width} elements is too long for int32 column numbers")
    return int(rows), int(width)


def _check_pattern(pattern: Pattern, width: int, stride: int) -> np.ndarray | None:
    """Ascending int64 columns, or None when all of them are trainable and a row has no padding."""
    if pattern is None:
        return None
    columns = kernels.check_columns(pattern, width)
    if stride and columns.size > stride:
        raise ValueError(f"rows of {columns.size} trainable columns do not fit into {stride} elements")
    return None if columns.size == width and stride in (0, width) else columns


def _running_counts(bits: np.ndarray) -> Tensor:
    """Set bits before each block and in all: int64 [blocks + 1]."""
    size = BLOCK // 8
    ones = [int(_ONES[bits[at : at + size]].sum()) for at in range(0, bits.size, size)]
    return torch.from_numpy(np.concatenate([[0], np.cumsum(ones)]).astype(np.int64))
