"""Weights that earlier shields let train, or that language packs move, and that a new shield is to leave alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from megatron_ssu.errors import UserError
from megatron_ssu.io.checksummed import sealed_format
from megatron_ssu.models.hf_files import row_window
from megatron_ssu.models.matrix import Matrix
from megatron_ssu.shield.mask import Granularity, Mask
from megatron_ssu.shield.pack_file import FORMAT as PACK_FORMAT
from megatron_ssu.shield.pack_file import Pack, Place, row_chunks
from megatron_ssu.shield.shield_file import Shield, load_shield


def open_reserved(path: str) -> Shield | Pack:
    """A file of shield.reserve. Raises UserError where it is neither a shield nor a pack."""
    return Pack(path) if sealed_format(path) == PACK_FORMAT else load_shield(path)


class Reserved:
    """What any of these shields trains, and any of these packs moves, of a matrix.

    A matrix that a shield does not name counts as trained by it; one that a pack does not name does not move.
    """

    def __init__(self, files: Sequence[Shield | Pack]) -> None:
        self._shields = [file for file in files if isinstance(file, Shield)]
        self._packs = [file for file in files if isinstance(file, Pack)]

    def units(self, matrix: Matrix, granularity: Granularity) -> np.ndarray | None:
        """bool [n]: the reserved units of a scored matrix; None without files.

        Raises UserError where a file is of a model with other shapes, or a shield cannot be said in units of `granularity`.
        """
        found = [_trained(shield, matrix, granularity) for shield in self._shields]
        found += [_moved(pack, matrix, granularity) for pack in self._packs]
        return np.any(found, axis=0) if found else None

    def further(self, matrices: Iterable[Matrix]) -> Iterator[tuple[Matrix, Mask]]:
        """Of every matrix without scores (embedding, head, norms, biases) that packs move, the mask that freezes those units:
        rows of what has two dimensions, else elements."""
        for matrix in matrices:
            granularity: Granularity = "row" if len(matrix.shape) == 2 else "element"
            moved = [_moved(pack, matrix, granularity) for pack in self._packs]
            if np.any(moved):
                yield matrix, Mask.of(granularity, matrix.shape, np.any(moved, axis=0))

    def check(self, masks: Mapping[str, Mask], matrices: Mapping[str, Matrix]) -> None:
        """Raises UserError where a shield with these masks would train what a pack moves."""
        for pack in self._packs:
            for name, matrix in sorted(matrices.items()):
                moved = _moved(pack, matrix, "element")
                mask = masks.get(name)
                if (moved if mask is None else moved & ~mask.full().reshape(-1)).any():
                    raise UserError(
                        f"shield.reserve: {pack.path}: moves weights of {name}, which shield.protect makes trainable; take the "
                        "rule or the pack out"
                    )


def _trained(shield: Shield, matrix: Matrix, granularity: Granularity) -> np.ndarray:
    mask = shield.masks.get(matrix.name) or Mask.constant(granularity, matrix.shape, False)
    if mask.shape != matrix.shape:
        raise _another_shape(shield.label, matrix, mask.shape)
    if mask.granularity != granularity and mask.frozen_units in (0, mask.units):
        mask = Mask.constant(granularity, matrix.shape, mask.frozen_units > 0)
    if granularity == "element":
        mask = mask.to_elements()
    if mask.granularity != granularity:
        raise UserError(
            f"shield.reserve: {shield.label}: freezes {matrix.name} by {mask.granularity}; set shield.granularity to that, or "
            "to element"
        )
    return ~mask.bits()


def _moved(pack: Pack, matrix: Matrix, granularity: Granularity) -> np.ndarray:
    """bool [n]: units of which any element moves."""
    tensor, window = row_window(matrix.name)
    found = np.zeros(Mask.constant(granularity, matrix.shape, False).units, dtype=bool)
    if tensor not in pack.moved:
        return found
    first = window.start if window else 0
    stop = window.stop if window else pack.moved[tensor].shape[0]
    shape = (max(0, min(stop, pack.moved[tensor].shape[0]) - first), *pack.moved[tensor].shape[1:])
    if shape != matrix.shape:
        raise _another_shape(str(pack.path), matrix, shape)
    place, width = Place(pack.frozen(tensor)), int(np.prod(shape[1:], dtype=np.int64))
    for rows in row_chunks(shape):
        moved = place.bools(slice(rows.start + first, rows.stop + first))
        if granularity == "column":
            found |= moved.any(axis=0)
        elif granularity == "row":
            found[rows] = moved.any(axis=1)
        else:
            found[rows.start * width : rows.stop * width] = moved.reshape(-1)
    return found


def _another_shape(label: str, matrix: Matrix, shape: tuple[int, ...]) -> UserError:
    return UserError(
        f"shield.reserve: {label}: {matrix.name} is {list(shape)}, the model's is {list(matrix.shape)}; name shields and packs "
        "of this model"
    )
