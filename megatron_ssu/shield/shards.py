"""Which elements of a shard are trainable, without an index as long as the shard.

A data-parallel rank owns the flat range [start, end) of a parameter shard [R, C] (row-major; a 1-D parameter [n] is
[1, n]). Rows of a fused parameter belong to several logical matrices, each with column numbers of its own:

    runs      RowRun(0, 4096, 0), RowRun(4096, 8192, 1)   rows [start, stop) use patterns[pattern]
    patterns  [int64 [K0], None]                          trainable columns, ascending; None: all; empty: row frozen

The range then is a handful of pieces: a partial first row, whole rows, a partial last row of each run. Element masks
keep one bit an element, and a running count every 8192 elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from megatron_ssu.shield import kernels
from megatron_ssu.shield.kernels import BLOCK, TILE_COLUMNS, TILE_ROWS

Pattern: TypeAlias = Tensor | None  # trainable columns, integers in ascending order; None for all of them

_PADDING = 8  # readable bytes behind every bit array: the kernels load whole words
_ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.int64)


@dataclass(frozen=True)
class RowRun:
    """Rows [start, stop) of the shard use `patterns[pattern]`. Runs cover [0, R) in order."""

    start: int
    stop: int
    pattern: int


@dataclass(frozen=True, eq=False)
class ShardMask:
    """The trainable elements of the flat range [start, end) of a shard [R, C]."""

    shape: tuple[int, int]
    start: int
    end: int
    numel: int  # trainable elements in the range
    elements: bool  # an element mask; else pieces
    tiles: int  # CUDA thread blocks that the pieces take
    host: Tensor  # CPU int64: pieces [P, 11] (columns: kernels.DENSE ...), or running counts [blocks + 1]
    index: Tensor  # the same on `device`
    bits: Tensor  # uint8 on `device`, 1 = trainable, lowest bit first: each pattern's columns, or the range's elements
    columns: Tensor  # int32 on `device`: the trainable columns of all patterns in use

    @property
    def length(self) -> int:
        """Elements in the range."""
        return self.end - self.start

    @property
    def frozen(self) -> int:
        """Frozen elements in the range."""
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
        cls, shape: Sequence[int], runs: Sequence[RowRun], patterns: Sequence[Pattern], start: int, end: int
    ) -> ShardMask:
        """The mask of rows that share column sets, on CPU.

        Raises ValueError when runs do not cover the rows in order, a pattern is not ascending within [0, C), or the
        range is not within the shard.
        """
        rows, width = _check_range(shape, start, end)
        builder = _Builder(width, start)
        if [run.start for run in runs] != [0, *(run.stop for run in runs)][:-1] or (
            runs[-1].stop if runs else 0
        ) != rows:
            raise ValueError(f"runs must cover rows 0 to {rows} in order")
        checked: dict[int, np.ndarray | None] = {}
        for run in runs:
            if run.pattern not in checked:
                checked[run.pattern] = _check_pattern(patterns[run.pattern], width)
            low, high = max(run.start * width, start), min(run.stop * width, end)
            if low < high:
                builder.add(run.pattern, checked[run.pattern], low, high)
        return builder.build((rows, width), end)

    @classmethod
    def from_bits(cls, shape: Sequence[int], frozen: Tensor | np.ndarray, start: int, end: int) -> ShardMask:
        """The mask of single elements, on CPU.

        `frozen` covers the whole shard: bool [R, C] (or flat), or uint8 [ceil(R * C / 8)] with the lowest bit first;
        True is frozen. Only the bits of [start, end) are kept. Raises ValueError on another size, dtype or range.
        """
        rows, width = _check_range(shape, start, end)
        array = frozen.detach().cpu().numpy() if isinstance(frozen, Tensor) else np.asarray(frozen)
        array = array.reshape(-1)
        if array.dtype == np.bool_ and array.size == rows * width:
            packed = np.packbits(array[start:end], bitorder="little")
        elif array.dtype == np.uint8 and array.size == (rows * width + 7) // 8:
            packed = _shift(array[start // 8 : (end + 7) // 8], start % 8)[: (end - start + 7) // 8]
        else:
            raise ValueError(
                f"frozen elements of a shard {(rows, width)} are bool [{rows * width}] or packed uint8 "
                f"[{(rows * width + 7) // 8}], not {array.dtype} [{array.size}]"
            )
        bits = np.zeros((end - start + 63) // 64 * 8 + _PADDING, dtype=np.uint8)
        np.invert(packed, out=bits[: packed.size])
        if (end - start) % 8:
            bits[packed.size - 1] &= (1 << (end - start) % 8) - 1
        blocks = np.zeros((end - start + BLOCK - 1) // BLOCK, dtype=np.int64)
        for b in range(0, blocks.size, 128):  # a few blocks at a time: the table look-up takes 8 bytes a byte
            part = bits[b * BLOCK // 8 : (b + 128) * BLOCK // 8]
            part = part[: part.size - _PADDING] if part.size < 128 * BLOCK // 8 else part
            blocks[b : b + 128] = np.add.reduceat(_ONES[part], range(0, part.size, BLOCK // 8)) if part.size else 0
        counts = torch.from_numpy(np.concatenate([[0], np.cumsum(blocks)]).astype(np.int64))
        empty = torch.empty(0, dtype=torch.int32)
        return cls((rows, width), start, end, int(counts[-1]), True, 0, counts, counts, torch.from_numpy(bits), empty)

    def to(self, device: torch.device | str) -> ShardMask:
        """The same mask with its index on `device`."""
        if torch.device(device) == self.device:
            return self
        index = self.host.to(device)
        return replace(self, index=index, bits=self.bits.to(index.device), columns=self.columns.to(index.device))

    def gather(self, src: Tensor, out: Tensor) -> None:
        """out = src[trainable] in ascending order, cast. `src` flat [end - start] float32, bfloat16 or float16, `out`
        float32 [numel]; both contiguous and on the mask's device, else ValueError."""
        kernels.gather(self, src, out)

    def scatter(self, values: Tensor, dst: Tensor) -> None:
        """dst[trainable] = values, rounded to nearest even; frozen elements of `dst` keep their bits. `values` float32
        [numel], `dst` flat [end - start]; as `gather`."""
        kernels.scatter(self, values, dst)

    def expand(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """float32 [numel] -> float32 [end - start] with `fill` in frozen places."""
        full = torch.full((self.length,), fill, dtype=torch.float32, device=self.device)
        self.scatter(values, full)
        return full

    def compact(self, full: Tensor) -> Tensor:
        """[end - start] of any floating dtype that `gather` takes -> float32 [numel]."""
        out = torch.empty(self.numel, dtype=torch.float32, device=self.device)
        self.gather(full, out)
        return out


class _Builder:
    """Collects pieces in flat order."""

    def __init__(self, width: int, start: int) -> None:
        self.width = width
        self.start = start
        self.pieces: list[list[int]] = []
        self.out = self.cost = self.tile = 0
        self.used: dict[int, tuple[int, int]] = {}  # pattern -> offset in the column list, offset in the bits (bytes)
        self.columns: list[np.ndarray] = []
        self.bits: list[np.ndarray] = []

    def add(self, number: int, columns: np.ndarray | None, low: int, high: int) -> None:
        """Flat [low, high) of the shard, all of it in rows that use this pattern."""
        if columns is None:
            self._dense(low, high)
            return
        if columns.size == 0:
            return
        if number not in self.used:
            bits = np.zeros((self.width + 63) // 64 * 8, dtype=np.uint8)
            chosen = np.zeros(self.width, dtype=bool)
            chosen[columns] = True
            bits[: (self.width + 7) // 8] = np.packbits(chosen, bitorder="little")
            self.used[number] = (sum(c.size for c in self.columns), sum(b.size for b in self.bits))
            self.columns.append(columns.astype(np.int32))
            self.bits.append(bits)
        first, offset = divmod(low, self.width)
        last, rest = divmod(high, self.width)
        if first == last:
            self._rows(number, columns, first, 1, offset, rest)
            return
        if offset:
            self._rows(number, columns, first, 1, offset, self.width)
            first += 1
        self._rows(number, columns, first, last - first, 0, self.width)
        self._rows(number, columns, last, 1, 0, rest)

    def _dense(self, low: int, high: int) -> None:
        length, src = high - low, low - self.start
        last = self.pieces[-1] if self.pieces else None
        if last and last[kernels.DENSE] and last[kernels.SRC] + last[kernels.WIDTH] == src:
            self.pieces.pop()  # one longer stretch with the one before it
            src, length = last[kernels.SRC], length + last[kernels.WIDTH]
            self.out, self.cost, self.tile = last[kernels.OUT], last[kernels.COST], last[kernels.TILE]
        self._append([1, src, 1, self.out, 0, length, length, 0, 0], -(-length // (TILE_ROWS * TILE_COLUMNS)))

    def _rows(self, number: int, columns: np.ndarray, row: int, rows: int, begin: int, end: int) -> None:
        """Columns [begin, end) of `rows` rows from `row` on."""
        low, high = (int(k) for k in np.searchsorted(columns, (begin, end)))
        if rows == 0 or low == high:
            return
        listed, packed = self.used[number]
        src, width, count = row * self.width + begin - self.start, end - begin, high - low
        tiles = -(-rows // TILE_ROWS) * -(-count // TILE_COLUMNS)
        self._append([0, src, rows, self.out, packed * 8 + begin, width, count, listed + low, begin], tiles)

    def _append(self, piece: list[int], tiles: int) -> None:
        self.pieces.append([*piece, self.cost, self.tile])
        self.out += piece[kernels.ROWS] * piece[kernels.COUNT]
        self.cost += piece[kernels.ROWS] * piece[kernels.WIDTH]
        self.tile += tiles

    def build(self, shape: tuple[int, int], end: int) -> ShardMask:
        pieces = torch.tensor(self.pieces, dtype=torch.int64).view(-1, 11)
        bits = np.concatenate([*self.bits, np.zeros(_PADDING, dtype=np.uint8)])
        columns = np.concatenate([*self.columns, np.empty(0, dtype=np.int32)])
        return ShardMask(
            shape, self.start, end, self.out, False, self.tile, pieces, pieces, *map(torch.from_numpy, (bits, columns))
        )


def _check_range(shape: Sequence[int], start: int, end: int) -> tuple[int, int]:
    if len(shape) not in (1, 2):
        raise ValueError(f"a shard has one or two dimensions, not {tuple(shape)}")
    rows, width = (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])
    if not 0 <= start <= end <= rows * width:
        raise ValueError(f"range [{start}, {end}) is not within a shard of {rows} x {width} elements")
    if width >= 1 << 31:
        raise ValueError(f"a row of {width} elements is too long for int32 column numbers")
    return int(rows), int(width)


def _check_pattern(pattern: Pattern, width: int) -> np.ndarray | None:
    """Ascending int64 columns, or None when all of them are trainable."""
    if pattern is None:
        return None
    columns = pattern.detach().cpu().numpy().astype(np.int64)
    if columns.ndim != 1 or (
        columns.size and (columns[0] < 0 or columns[-1] >= width or (np.diff(columns) <= 0).any())
    ):
        raise ValueError(f"trainable columns must ascend within [0, {width})")
    return None if columns.size == width else columns


def _shift(packed: np.ndarray, bits: int) -> np.ndarray:
    """Bytes with the lowest `bits` bits dropped, the rest moved down."""
    if bits == 0:
        return packed
    following = np.append(packed[1:], np.uint8(0))
    return (packed >> np.uint8(bits)) | (following << np.uint8(8 - bits))
