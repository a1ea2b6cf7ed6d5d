"""A language pack: what an adaptation moved, as exclusive-or of the bits before and after, so that it goes both ways.

On disk a sealed safetensors file. Of a tensor NAME that moved it holds

    frozen/NAME    uint8, packed as in a shield: the columns, rows or elements (whatever takes least) in which nothing moved
    xor/NAME       unsigned integers [n] of the tensor's width: source ^ adapted of all others, in order of rows

and of both directories what is needed to write them again, byte by byte: `head/SIDE/FILE` is what a weights file begins with,
`file/SIDE/NAME` another file that the two do not have in common (SIDE: source, result).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_ssu.errors import UserError
from megatron_ssu.io.checksummed import SealedFile
from megatron_ssu.shield.mask import Mask

FORMAT = "megatron-ssu pack 1"
Side = Literal["source", "result"]
_CHUNK = 1 << 24  # elements at a time


@dataclass(frozen=True)
class Moved:
    """What moved of one tensor. Digests are sha256 of the bytes of these elements, in order of rows."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' name
    granularity: str
    elements: int
    source: str
    result: str


@dataclass(frozen=True)
class End:
    """One of the two models that a pack lies between."""

    name: str
    fingerprint: str  # models/fingerprint.py
    digest: str  # of every bit of its weights: packs/weights.py
    heads: tuple[str, ...]  # its weights files
    files: tuple[str, ...]  # its other files that are not the same in both


class Pack:
    """A pack file, opened; its tensors are read, and checked, one by one."""

    def __init__(self, path: str | Path) -> None:
        """Raises UserError when the file is missing, of another kind, truncated or altered."""
        self.file = SealedFile(path, FORMAT, "pack")
        header = self.file.header
        try:
            self.shield = str(header["shield"])
            self.ends = {side: _end(header[side]) for side in ("source", "result")}
            self.moved = {n: Moved(**{**m, "shape": tuple(m["shape"])}) for n, m in sorted(header["moved"].items())}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: the pack file's header lacks {error}; make it again") from error

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def digest(self) -> str:
        """sha256 (hex) that stands for the whole content."""
        return self.file.digest

    @property
    def elements(self) -> int:
        """How many it moves, of all tensors."""
        return sum(moved.elements for moved in self.moved.values())

    def frozen(self, name: str) -> Mask:
        """Where nothing moved in a tensor that moved."""
        moved = self.moved[name]
        try:
            mask = Mask(moved.granularity, moved.shape, self.file.get(f"frozen/{name}"))  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(f"{self.path}: the pack file is damaged at {name}: {error}; make it again") from error
        return mask

    def change(self, name: str) -> Change:
        """What to do with a tensor that moved."""
        return Change(self.frozen(name), self.file.get(f"xor/{name}"))

    def head(self, side: Side, file: str) -> bytes:
        """The length and header that a weights file begins with."""
        return self.file.get(f"head/{side}/{file}").tobytes()

    def files(self, side: Side) -> dict[str, bytes]:
        """Files beside the weights that are not the same in both directories."""
        return {name: self.file.get(f"file/{side}/{name}").tobytes() for name in self.ends[side].files}


class Change:
    """The elements of a tensor that move, and by what; for rows from the first to the last."""

    def __init__(self, frozen: Mask, xor: np.ndarray) -> None:
        self.place, self._xor, self._at = Place(frozen), xor, 0

    def next(self, count: int) -> np.ndarray:
        """The next numbers."""
        self._at += count
        return self._xor[self._at - count : self._at]


class Place:
    """Where a tensor moves."""

    def __init__(self, frozen: Mask) -> None:
        self._mask = frozen
        self._units = np.empty(0, bool) if frozen.granularity == "element" else ~frozen.bits()
        self._width = int(np.prod(frozen.shape[1:], dtype=np.int64))

    def of(self, rows: slice) -> Any:
        """An index into these rows [r, width] that gives what moves of them, in order."""
        if self._mask.granularity == "column":
            return np.s_[:, np.flatnonzero(self._units)]
        if self._mask.granularity == "row":
            return np.flatnonzero(self._units[rows])
        return (~self._mask.bits(rows.start * self._width, rows.stop * self._width)).reshape(-1, self._width)

    def bools(self, rows: slice) -> np.ndarray:
        """bool [r, width]: whether an element moves."""
        found = np.zeros((rows.stop - rows.start, self._width), dtype=bool)
        found[self.of(rows)] = True
        return found


def row_chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows of a tensor in chunks of bounded size; but for the last, of a multiple of 8."""
    width = int(np.prod(shape[1:], dtype=np.int64))
    step = max(8, _CHUNK // max(1, width) // 8 * 8)
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def shared_elements(one: Pack, other: Pack) -> dict[str, int]:
    """Elements that both packs move, by tensor; tensors without any are left out."""
    found = {}
    for name in sorted(one.moved.keys() & other.moved.keys()):
        if one.moved[name].shape != other.moved[name].shape:
            raise UserError(
                f"{other.path}: {name} is {list(other.moved[name].shape)}, in {one.path} {list(one.moved[name].shape)}; "
                "name packs of one model"
            )
        places = [Place(pack.frozen(name)) for pack in (one, other)]
        count = sum(
            int((places[0].bools(rows) & places[1].bools(rows)).sum()) for rows in row_chunks(one.moved[name].shape)
        )
        if count:
            found[name] = count
    return found


def _end(values: dict[str, Any]) -> End:
    return End(**{**values, "heads": tuple(values["heads"]), "files": tuple(values["files"])})
