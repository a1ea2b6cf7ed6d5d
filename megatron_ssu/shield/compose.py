"""Shields of one model combined: union, intersection, difference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np

from megatron_ssu.errors import UserError
from megatron_ssu.models.matrix import Matrix
from megatron_ssu.shield.mask import Mask
from megatron_ssu.shield.shield_file import Shield, check_model

# On packed bits; bits after the last unit are zero in every operand and stay so.
OPERATIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "union": np.bitwise_or,
    "intersection": np.bitwise_and,
    "difference": lambda a, b: a & ~b,
}


def compose(operation: str, shields: Sequence[Shield]) -> Shield:
    """Combine two or more shields of the same model; `difference` takes all later ones from the first.

    A matrix keeps its granularity when all shields that name it agree, else it becomes 'element'. A matrix that a
    shield does not name is trainable there. UserError for an unknown operation, fewer than two shields or
    another model.
    """
    if operation not in OPERATIONS:
        raise UserError(f"compose: {operation!r} is unknown; choose one of {', '.join(OPERATIONS)}")
    if len(shields) < 2:
        raise UserError(f"compose: {operation} needs two shield files or more, not {len(shields)}")
    first = shields[0]
    matrices: dict[str, Matrix] = {}
    for shield in shields:
        check_model(shield, first.fingerprint, first.model)
        for name, matrix in shield.matrices.items():
            if matrices.setdefault(name, matrix).shape != matrix.shape:
                raise UserError(f"compose: {name} is {matrix.shape} in one shield, {matrices[name].shape} in another")
    masks = {name: _combine(operation, name, shields) for name in sorted(matrices)}
    return Shield(
        method="composed",
        model=first.model,
        fingerprint=first.fingerprint,
        matrices={name: matrices[name] for name in sorted(matrices)},
        masks=masks,
        score=_common([s.score for s in shields]),
        granularity=_common([s.granularity for s in shields]),
        budget=_common([s.budget for s in shields]),
        ratio=None,
        calibration=_common([s.calibration for s in shields]),
        made={"operation": operation, "of": [_origin(shield) for shield in shields]},
    )


def moved_on(shield: Shield, fingerprint: str, model: str) -> Shield:
    """The same masks for the model of this fingerprint and name: the shield's own model, trained on since."""
    made = {"operation": "moved on", "of": [_origin(shield)]}
    return replace(shield, fingerprint=fingerprint, model=model, masks=dict(shield.masks), made=made)


def _combine(operation: str, name: str, shields: Sequence[Shield]) -> Mask:
    present = [shield.masks.get(name) for shield in shields]
    known = [mask for mask in present if mask is not None]
    granularity, shape = known[0].granularity, known[0].shape
    if any(mask.granularity != granularity for mask in known):
        granularity = "element"
        present = [mask and mask.to_elements() for mask in present]
    operands = [(mask or Mask.constant(granularity, shape, False)).packed for mask in present]
    return Mask(granularity, shape, reduce(OPERATIONS[operation], operands))


def _common(values: Sequence[str]) -> str:
    return values[0] if len(set(values)) == 1 else "mixed"


def _origin(shield: Shield) -> dict[str, Any]:
    """What the header says of a part."""
    keys = ("method", "score", "granularity", "budget", "ratio", "calibration", "plan", "made")
    return {key: getattr(shield, key) for key in keys} | {"sha256": shield.digest()}
