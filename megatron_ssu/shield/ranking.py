"""What units are ranked by, and which of a ranking are frozen; numpy alone, but for weights that are asked for.

From one scores file every mesh ranks alike. Scores made on two meshes differ by rounding, since the meshes add in different
order: units within TIE (relative) of the cut are one tie, and of a tie the lower numbers are frozen. So equal units are
decided alike everywhere, and two shields can differ only in units that lie that near to the cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_ssu.errors import UserError
from megatron_ssu.models.matrix import KINDS, Matrix
from megatron_ssu.scoring.registry import score_named
from megatron_ssu.scoring.scores_file import Axis, Scores, axis_units, random_scores

if TYPE_CHECKING:
    import torch

TIE = 1e-5  # relative to the cut; fp32 scores of two meshes agree within it
ENDS = ("highest", "lowest")
Weights = Callable[[str], "torch.Tensor"]  # matrix name -> tensor [O, I] on the CPU


def freeze_units(values: np.ndarray, count: int, end: str = "highest") -> np.ndarray:
    """bool [n]: True for the `count` highest, or lowest, of `values` >= 0 [n].

    The cut is the count-th of them. Values within TIE of it count as equal, and of equal ones the lower index is frozen
    first.
    """
    if count <= 0:
        return np.zeros(values.size, dtype=bool)
    if count >= values.size:
        return np.ones(values.size, dtype=bool)
    if end == "highest":
        cut = float(np.partition(values, values.size - count)[values.size - count])
        frozen = values > cut * (1 + TIE)
    else:
        cut = float(np.partition(values, count - 1)[count - 1])
        frozen = values < cut * (1 - TIE)
    ties = np.flatnonzero((values >= cut * (1 - TIE)) & (values <= cut * (1 + TIE)) & ~frozen)
    frozen[ties[: count - int(frozen.sum())]] = True
    return frozen


def axis_scores(scores: Scores, score: str, axis: Axis, matrix: Matrix, seed: int) -> np.ndarray:
    """float64 [I], [O] or [1]; `random` is made from `seed` unless the file has it."""
    if score_named(score).needs == "seed" and not scores.has(score, axis, matrix.name):
        return random_scores(seed, matrix.name, axis, axis_units(axis, matrix.shape))
    return scores.get(score, axis, matrix.name)


def element_scores(
    scores: Scores, score: str, matrix: Matrix, weights: Weights | None, before: Weights | None = None
) -> np.ndarray:
    """float32 [O, I] (float64 for float64 weights) that rank the elements of one matrix.

    weights, before: see `plan.plan_shield`. Factors are scaled by a power of two where that changes no rank.
    """
    entry = score_named(score)
    term = entry.element
    if term is None:
        raise UserError(f"shield.score: {score!r} has no element scores; choose another shield.granularity")
    w = None
    if term.weights:
        if weights is None:
            raise UserError(
                f"shield.granularity: element needs the weights for score {score}; give the model's directory"
            )
        w = absolute_weights(weights, matrix) if entry.needs != "change" else _absolute_change(weights, before, matrix)
    factors = [_factor(scores, key, matrix, scaled=term.scale_free) for key in term.factors]
    return np.broadcast_to(term.term(w, *factors), matrix.shape)


def matrix_score(scores: Scores, score: str, matrix: Matrix, seed: int) -> float:
    """The score of a whole matrix: its matrix term, else the mean over its elements of the column score."""
    entry = score_named(score)
    if entry.matrix is not None or entry.needs == "seed":
        return float(axis_scores(scores, score, "matrix", matrix, seed)[0])
    return float(axis_scores(scores, score, "column", matrix, seed).sum()) / matrix.elements


def layer_scores(values: Mapping[str, float], matrices: Mapping[str, Matrix]) -> dict[int, float]:
    """Layer -> score: the mean over its `matrices` of the matrix score, divided by the average over those of its kind.

    values: the scores of all `matrices`, by name.
    """
    by_kind: dict[str, list[float]] = {}
    for name, matrix in matrices.items():
        by_kind.setdefault(matrix.kind, []).append(values[name])
    average = {kind: math.fsum(members) / len(members) for kind, members in by_kind.items()}
    by_layer: dict[int, list[float]] = {}
    for name, matrix in matrices.items():
        if matrix.layer is not None:
            relative = values[name] / average[matrix.kind] if average[matrix.kind] else 1.0
            by_layer.setdefault(matrix.layer, []).append(relative)
    return {layer: math.fsum(members) / len(members) for layer, members in sorted(by_layer.items())}


def absolute_weights(weights: Weights, matrix: Matrix, offset: float = 0.0) -> np.ndarray:
    """|offset + W| [shape] as float32 (float64 stays); UserError naming the matrix when one is NaN or infinite."""
    return _checked(_read(weights, matrix).add_(offset).abs_(), matrix, "the weights hold")


def _absolute_change(weights: Weights, before: Weights | None, matrix: Matrix) -> np.ndarray:
    """|W - W_before| as `absolute_weights`."""
    if before is None:
        raise UserError("shield.change_from: needed for shield.granularity element with score change; name it")
    return _checked(_read(weights, matrix).sub_(_read(before, matrix)).abs_(), matrix, "the two checkpoints hold")


def _read(weights: Weights, matrix: Matrix) -> torch.Tensor:
    """A copy as float32; float64 stays."""
    import torch  # late: most shields are planned without a weight

    weight = weights(matrix.name)
    if tuple(weight.shape) != matrix.shape:
        raise UserError(f"{matrix.name}: the weight is {tuple(weight.shape)}, the scores file says {matrix.shape}")
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.detach().to("cpu", dtype, copy=True)


def _checked(weight: torch.Tensor, matrix: Matrix, who: str) -> np.ndarray:
    values = weight.numpy()
    if not np.isfinite(values).all():
        raise UserError(f"{matrix.name}: {who} NaN or infinite values; look for a broken checkpoint")
    return values


def _factor(scores: Scores, key: str, matrix: Matrix, *, scaled: bool) -> np.ndarray:
    """float32 [I] of 'NAME/column', [O, 1] of 'NAME/row'; `scaled`, so that products neither overflow nor vanish."""
    name, _, axis = key.partition("/")
    values: np.ndarray[Any, Any] = scores.get(name, "row" if axis == "row" else "column", matrix.name)
    if scaled:
        _, exponent = np.frexp(values.max(initial=0.0))
        values = np.ldexp(values, -exponent)
    values = values.astype(np.float32)
    return values[:, None] if axis == "row" else values


def by_layer(matrices: Mapping[str, Matrix]) -> list[Matrix]:
    """`matrices` in the order of layers, then of kinds: the order in which ties are broken."""
    return sorted(matrices.values(), key=lambda m: (m.layer if m.layer is not None else -1, KINDS.index(m.kind)))
