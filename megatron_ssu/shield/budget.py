"""How many units (columns, rows or elements) of each matrix are frozen.

uniform     floor(ratio * units) of every matrix.
per-kind    the same with a ratio of its own for attention, for MLP, or for single kinds.
layerwise   one budget of ratio * elements over all matrices, spread by importance: a matrix's importance is its mean
            score, divided by the average of that over the matrices of its kind (whose inputs are of one scale). Its
            ratio is clip(level * importance, floor, ceiling); the level is the one that spends the budget
            (water-filling). What rounding down to whole units leaves goes to the largest remainders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from megatron_ssu.errors import UserError
from megatron_ssu.models.matrix import ATTENTION_KINDS, MLP_KINDS, Matrix
from megatron_ssu.shield.mask import unit_count

BUDGETS = ("uniform", "layerwise", "per-kind")
GROUPS = {"attention": ATTENTION_KINDS, "mlp": MLP_KINDS}
_LEAST_IMPORTANCE = 2.0**-20  # so that a matrix of zeros still takes a part when all others are at the ceiling


def check_ratio(value: float, key: str) -> None:
    """UserError unless `value` is a number in [0, 1]; `key` names it."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:  # NaN compares false
        raise UserError(f"{key}: must be a fraction from 0 to 1, got {value!r}")


def units_of_ratio(ratio: float, units: int) -> int:
    """floor(ratio * units), the ratio taken as its shortest decimal: 0.29 of 100 is 29, not 28."""
    return math.floor(Fraction(repr(float(ratio))) * units)


def uniform_counts(matrices: Mapping[str, Matrix], granularity: str, ratio: float) -> dict[str, int]:
    """Units to freeze by matrix."""
    return {n: units_of_ratio(ratio, unit_count(granularity, m.shape)) for n, m in matrices.items()}


def kind_ratios(matrices: Mapping[str, Matrix], ratio: float, kinds: Mapping[str, float]) -> dict[str, float]:
    """Ratio of every kind among `matrices`. `kinds`: 'attention', 'mlp' or a kind -> ratio.

    A kind's own entry goes before its group's, kinds without an entry take `ratio`. UserError for a name that
    is none of these or fits no matrix.
    """
    present = {m.kind for m in matrices.values()}
    for key in kinds:
        members = GROUPS.get(key, (key,))
        if not present.intersection(members):
            known = ", ".join([*GROUPS, *sorted(present)])
            raise UserError(f"shield.kinds.{key}: no such kind among the planned matrices; there are {known}")
    by_kind = dict.fromkeys(present, ratio)
    for group, members in GROUPS.items():
        if group in kinds:
            by_kind.update({kind: kinds[group] for kind in members if kind in present})
    by_kind.update({kind: value for kind, value in kinds.items() if kind in present})
    return by_kind


def per_kind_counts(
    matrices: Mapping[str, Matrix], granularity: str, ratio: float, kinds: Mapping[str, float]
) -> dict[str, int]:
    """Units to freeze by matrix; `kinds` as in `kind_ratios`."""
    by_kind = kind_ratios(matrices, ratio, kinds)
    return {n: units_of_ratio(by_kind[m.kind], unit_count(granularity, m.shape)) for n, m in matrices.items()}


def layerwise_counts(
    matrices: Mapping[str, Matrix],
    granularity: str,
    ratio: float,
    mean_scores: Mapping[str, float],
    floor: float,
    ceiling: float,
) -> dict[str, int]:
    """Units to freeze by matrix; see the module's head. `mean_scores`: the mean score of an element of each matrix.

    0 <= floor <= ratio <= ceiling <= 1.
    """
    names = sorted(matrices)
    if not names:
        return {}
    units = np.array([unit_count(granularity, matrices[n].shape) for n in names], dtype=np.int64)
    sizes = np.array([matrices[n].elements for n in names], dtype=np.int64) // units
    most = np.array([units_of_ratio(ceiling, int(u)) for u in units])
    least = np.minimum(most, [math.ceil(Fraction(repr(float(floor))) * int(u)) for u in units])
    budget = math.floor(Fraction(repr(float(ratio))) * int((units * sizes).sum()))
    wanted = _fill(units, sizes, least, most, _importance(matrices, names, mean_scores), budget)
    counts = np.clip(np.floor(wanted).astype(np.int64), least, most)
    left = budget - int((counts * sizes).sum())
    # Whole units to the largest remainders, which count as equal where they differ by a mesh's rounding only.
    for i in np.argsort(-np.round(wanted - counts, 4), kind="stable"):
        if left >= sizes[i] and counts[i] < most[i]:
            counts[i] += 1
            left -= int(sizes[i])
    for i in np.argsort(sizes, kind="stable"):  # the rest, which clipping or large units left over
        extra = max(0, min(left // int(sizes[i]), int(most[i] - counts[i])))
        counts[i] += extra
        left -= extra * int(sizes[i])
    return dict(zip(names, (int(c) for c in counts)))


def _importance(matrices: Mapping[str, Matrix], names: list[str], mean_scores: Mapping[str, float]) -> np.ndarray:
    """float64 [matrices]: mean score over the kind's average of it."""
    by_kind: dict[str, list[float]] = {}
    for name in names:
        by_kind.setdefault(matrices[name].kind, []).append(mean_scores[name])
    average = {kind: math.fsum(values) / len(values) for kind, values in by_kind.items()}
    importance = [mean_scores[n] / average[matrices[n].kind] if average[matrices[n].kind] else 1.0 for n in names]
    return np.maximum(importance, _LEAST_IMPORTANCE)


def _fill(
    units: np.ndarray, sizes: np.ndarray, least: np.ndarray, most: np.ndarray, importance: np.ndarray, budget: int
) -> np.ndarray:
    """float64 [matrices]: units by matrix at the level of importance that spends `budget`, by bisection."""

    def at(level: float) -> np.ndarray:
        units_at: np.ndarray = np.clip(level * importance * units, least, most)
        return units_at

    low, high = 0.0, 1.0 / float(importance.min())
    for _ in range(200):
        middle = (low + high) / 2
        if float((at(middle) * sizes).sum()) > budget:
            high = middle
        else:
            low = middle
    return at(low)
