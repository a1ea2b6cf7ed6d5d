"""Weights that earlier shields let train, and that a new one is to leave alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_ssu.errors import UserError
from megatron_ssu.models.matrix import Matrix
from megatron_ssu.shield.mask import Granularity, Mask
from megatron_ssu.shield.shield_file import Shield


class Reserved:
    """What any of these shields trains of a matrix. A matrix that a shield does not name counts as trained by it."""

    def __init__(self, shields: Sequence[Shield]) -> None:
        self._shields = shields

    def units(self, matrix: Matrix, granularity: Granularity) -> np.ndarray | None:
        """bool [n]: the trained units of a matrix; None without shields.

        Raises UserError where a shield is of a model with other shapes, or cannot be said in units of `granularity`.
        """
        if not self._shields:
            return None
        trained = [_trained(shield, matrix, granularity) for shield in self._shields]
        return np.any(trained, axis=0)  # type: ignore[no-any-return]


def _trained(shield: Shield, matrix: Matrix, granularity: Granularity) -> np.ndarray:
    mask = shield.masks.get(matrix.name) or Mask.constant(granularity, matrix.shape, False)
    if mask.shape != matrix.shape:
        raise UserError(
            f"shield.reserve: {shield.label}: {matrix.name} is {list(mask.shape)}, the model's is {list(matrix.shape)}; name "
            "shields of this model"
        )
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
