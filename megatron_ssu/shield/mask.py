"""The frozen units of one matrix as packed bits: eight to a byte, lowest bit first, unused bits zero; True is frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Granularity = Literal["column", "row", "element"]
GRANULARITIES: tuple[Granularity, ...] = ("column", "row", "element")
_ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


@dataclass(frozen=True, eq=False)
class Mask:
    """The frozen units of one matrix."""

    granularity: Granularity
    shape: tuple[int, ...]  # of the matrix: [O, I], or [H] with granularity 'element'
    packed: np.ndarray  # uint8 [ceil(units / 8)], lowest bit first

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity {self.granularity!r} is none of {', '.join(GRANULARITIES)}")
        if self.granularity != "element" and len(self.shape) != 2:
            raise ValueError(f"a {self.granularity} mask needs a matrix with two dimensions, not {self.shape}")
        if self.packed.dtype != np.uint8 or self.packed.shape != ((self.units + 7) // 8,):
            raise ValueError(f"{self.units} units need {(self.units + 7) // 8} bytes, not {self.packed.shape}")
        if self.units % 8 and int(self.packed[-1]) >> (self.units % 8):
            raise ValueError("bits after the last unit are set")

    @classmethod
    def of(cls, granularity: Granularity, shape: tuple[int, ...], frozen: np.ndarray) -> Mask:
        """Pack bool `frozen`: [I] for columns, [O] for rows, [shape] or flat for elements."""
        return cls(granularity, tuple(shape), np.packbits(np.ascontiguousarray(frozen).reshape(-1), bitorder="little"))

    @classmethod
    def constant(cls, granularity: Granularity, shape: tuple[int, ...], frozen: bool) -> Mask:
        """All units frozen, or none."""
        packed = np.full((unit_count(granularity, shape) + 7) // 8, 255 if frozen else 0, dtype=np.uint8)
        spare = -unit_count(granularity, shape) % 8
        if frozen and spare:
            packed[-1] >>= spare
        return cls(granularity, tuple(shape), packed)

    @property
    def units(self) -> int:
        """How many columns, rows or elements."""
        return unit_count(self.granularity, self.shape)

    @property
    def frozen_units(self) -> int:
        chunks = (self.packed[i : i + (1 << 20)] for i in range(0, self.packed.size, 1 << 20))
        return sum(int(_ONES[chunk].sum()) for chunk in chunks)

    def equals(self, other: Mask) -> bool:
        """Whether both freeze the same units."""
        same = (self.granularity, self.shape) == (other.granularity, other.shape)
        return same and np.array_equal(self.packed, other.packed)

    @property
    def elements_per_unit(self) -> int:
        return {"column": self.shape[0], "row": self.shape[-1], "element": 1}[self.granularity]

    @property
    def frozen_elements(self) -> int:
        return self.frozen_units * self.elements_per_unit

    def bits(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """bool [stop - start]: units `start` to `stop`, unpacked."""
        stop = self.units if stop is None else stop
        unpacked = np.unpackbits(self.packed[start // 8 : (stop + 7) // 8], bitorder="little")
        return unpacked[start % 8 : start % 8 + stop - start].view(bool)

    def columns(self) -> np.ndarray:
        """bool [I] of a column mask."""
        return self._bits_of("column")

    def rows(self) -> np.ndarray:
        """bool [O] of a row mask."""
        return self._bits_of("row")

    def elements(self) -> np.ndarray:
        """bool [shape] of an element mask."""
        return self._bits_of("element").reshape(self.shape)

    def full(self) -> np.ndarray:
        """bool [shape], whatever the granularity (a byte an element: one matrix at a time; maybe a read-only view)."""
        if self.granularity == "column":
            return np.broadcast_to(self.bits()[None, :], self.shape)
        if self.granularity == "row":
            return np.broadcast_to(self.bits()[:, None], self.shape)
        return self.elements()

    def to_elements(self) -> Mask:
        """The same as an element mask."""
        return self if self.granularity == "element" else Mask.of("element", self.shape, self.full())

    def _bits_of(self, granularity: str) -> np.ndarray:
        if self.granularity != granularity:
            raise ValueError(f"a mask by {self.granularity} has no bits by {granularity}; use full()")
        return self.bits()


def unit_count(granularity: str, shape: tuple[int, ...]) -> int:
    """How many units a mask of a matrix has."""
    if granularity == "column":
        return shape[-1]
    if granularity == "row":
        return shape[0]
    return int(np.prod(shape, dtype=np.int64))
