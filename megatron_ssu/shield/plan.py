"""Scores and a budget become a shield: pure functions on numpy arrays, the same on every machine and mesh.

From one scores file every mesh plans the same bytes. Scores made on two meshes differ by rounding, since the meshes add in
different order: units within TIE (relative) of the cut are one tie, and of a tie the lower numbers are frozen. So equal
columns are decided alike everywhere, and two shields can differ only in units that lie that near to the cut.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from megatron_ssu.errors import UserError
from megatron_ssu.models.matrix import ATTENTION_KINDS, MLP_KINDS, Matrix
from megatron_ssu.scoring.scores_file import INPUT_MEAN_SQUARE, INPUT_NORM, Scores, random_bits, random_scores
from megatron_ssu.shield.budget import (
    BUDGETS,
    check_ratio,
    layerwise_counts,
    per_kind_counts,
    uniform_counts,
)
from megatron_ssu.shield.mask import GRANULARITIES, Granularity, Mask
from megatron_ssu.shield.shield_file import Shield

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

TIE = 1e-5  # relative to the cut; fp32 scores of two meshes agree within it
ELEMENT_SCORES = ("wanda", "wanda-released", "magnitude", "random", "sparsegpt-diagonal", "fisher")
NORMS = ("trainable", "frozen", "half")
SELECTORS: dict[str, tuple[str, ...]] = {
    "embeddings": ("embedding",),
    "head": ("head",),
    "norms": ("norm",),
    "attention": ATTENTION_KINDS,
    "mlp": MLP_KINDS,
}
Weights = Callable[[str], "torch.Tensor"]


@dataclass(frozen=True)
class ProtectRule:
    """Weights that are always frozen or always trainable, whatever their scores.

    `pattern`: embeddings, head, norms, attention, mlp, layers:3, layers:0-3, or a file-name pattern over tensor names.
    """

    pattern: str
    action: Literal["frozen", "trainable"]


@dataclass(frozen=True)
class PlanOptions:
    """What to shield. Everything but `score`, `granularity` and `ratio` may stay as it is."""

    score: str = "wanda"
    granularity: Granularity = "column"
    budget: str = "uniform"
    ratio: float = 0.5  # frozen share
    kinds: Mapping[str, float] = field(default_factory=dict)  # budget per-kind: attention, mlp or a kind -> ratio
    floor: float = 0.0  # budget layerwise: least and greatest frozen share of a matrix
    ceiling: float = 1.0
    seed: int = 1234  # of the score random, where the scores file has none
    protect: Sequence[ProtectRule] = ()  # a later rule goes before an earlier one
    norms: str = "trainable"  # trainable, frozen, half


def check_options(options: PlanOptions) -> None:
    """UserError, naming the key, for what can be told without scores."""
    for key, value, known in (
        ("granularity", options.granularity, GRANULARITIES),
        ("budget", options.budget, BUDGETS),
        ("norms", options.norms, NORMS),
    ):
        if value not in known:
            raise UserError(f"shield.{key}: {value!r} is unknown; choose one of {', '.join(known)}")
    for key in ("ratio", "floor", "ceiling"):
        check_ratio(getattr(options, key), f"shield.{key}")
    for kind, ratio in options.kinds.items():
        check_ratio(ratio, f"shield.kinds.{kind}")
    if options.budget == "layerwise" and not options.floor <= options.ratio <= options.ceiling:
        raise UserError(
            f"shield.ratio: {options.ratio} does not lie between shield.floor {options.floor} and shield.ceiling "
            f"{options.ceiling}; move one of them"
        )
    if options.kinds and options.budget != "per-kind":
        raise UserError(f"shield.kinds: has a meaning with shield.budget per-kind alone, not {options.budget}")
    if options.granularity == "element" and options.score not in ELEMENT_SCORES:
        raise UserError(
            f"shield.score: {options.score!r} has no element scores; choose one of {', '.join(ELEMENT_SCORES)}"
        )
    for rule in options.protect:
        if rule.action not in ("frozen", "trainable"):
            raise UserError(f"shield.protect: {rule.pattern!r} must be frozen or trainable, not {rule.action!r}")


def plan_shield(
    scores: Scores,
    options: PlanOptions,
    *,
    method: str,
    frozen_rows: Mapping[str, tuple[tuple[int, ...], list[int]]] | None = None,
    weights: Weights | None = None,
) -> Shield:
    """Choose what to freeze.

    scores: of all matrices; those of the seven linear kinds are planned, the others can be protected.
    frozen_rows: embedding or head name -> (shape, row numbers), the special tokens' rows.
    weights: matrix name -> tensor [shape] on the CPU; for element granularity (wanda, wanda-released, magnitude) and
        norms 'half'. One matrix at a time is asked for and not kept.
    Protected matrices are outside the budget: it is spent over the rest. UserError for impossible options, scores
    that are missing, NaN or infinite (naming the matrix) and a rule that fits nothing.
    """
    check_options(options)
    fixed = protected(scores.matrices, options.protect)
    planned = {n: m for n, m in sorted(scores.matrices.items()) if m.scored and n not in fixed}
    counts = _counts(scores, options, planned)
    masks: dict[str, Mask] = {}
    for name, matrix in planned.items():
        values = _unit_scores(scores, options, matrix, weights)
        masks[name] = Mask.of(options.granularity, matrix.shape, freeze_top(values, counts[name]))
    notes = _plan_norms(scores, options, weights, masks)
    for name, (shape, rows) in sorted((frozen_rows or {}).items()):
        masks[name] = _row_mask(scores.matrices, name, shape, rows)
    for name, action in fixed.items():
        matrix = scores.matrices[name]
        if action == "frozen" or matrix.scored:
            masks[name] = Mask.constant(_plain_granularity(matrix, options), matrix.shape, action == "frozen")
        else:
            masks.pop(name, None)
    return Shield(
        method=method,
        model=scores.model,
        fingerprint=scores.fingerprint,
        matrices={name: scores.matrices[name] for name in sorted(masks)},
        masks={name: masks[name] for name in sorted(masks)},
        score=options.score,
        granularity=options.granularity,
        budget=options.budget,
        ratio=float(options.ratio),
        calibration=scores.calibration,
        plan=_plan_header(options) | notes,
    )


def freeze_top(values: np.ndarray, count: int) -> np.ndarray:
    """bool [n]: True for the `count` greatest of `values` >= 0 [n].

    The cut is the count-th greatest value. Values within TIE of it count as equal, and of equal ones the lower index is
    frozen first.
    """
    if count <= 0:
        return np.zeros(values.size, dtype=bool)
    if count >= values.size:
        return np.ones(values.size, dtype=bool)
    cut = float(np.partition(values, values.size - count)[values.size - count])
    frozen = values > cut * (1 + TIE)
    ties = np.flatnonzero((values >= cut * (1 - TIE)) & ~frozen)
    frozen[ties[: count - int(frozen.sum())]] = True
    return frozen


def axis_scores(scores: Scores, score: str, axis: Literal["column", "row"], matrix: Matrix, seed: int) -> np.ndarray:
    """float64 [I] or [O]; `random` is made from `seed` unless the file has it."""
    if score == "random" and not scores.has(score, axis, matrix.name):
        return random_scores(seed, matrix.name, axis, matrix.shape[0 if axis == "row" else -1])
    return scores.get(score, axis, matrix.name)


def _unit_scores(scores: Scores, options: PlanOptions, matrix: Matrix, weights: Weights | None) -> np.ndarray:
    """Values to rank the units of one matrix by, flat."""
    if options.granularity != "element":
        return axis_scores(scores, options.score, options.granularity, matrix, options.seed)
    if options.score == "random":
        return random_bits(options.seed, matrix.name, "element", matrix.elements)
    return element_scores(scores, options.score, matrix, weights).reshape(-1)


def element_scores(scores: Scores, score: str, matrix: Matrix, weights: Weights | None) -> np.ndarray:
    """float32 [O, I] (float64 for float64 weights) that rank the elements of one matrix.

    wanda: |W_ij| ||X_j||; wanda-released: |W_ij| mean(X_j^2); magnitude: |W_ij|; sparsegpt-diagonal: mean(X_j^2), so
    whole columns; fisher: row score * column score, the rank-one estimate, since the squared gradients are not kept.
    Factors are scaled by a power of two, which changes no rank. Statistics come from `scores`.
    """
    if score == "sparsegpt-diagonal":
        column = _factor(scores, score, "column", matrix)
        return np.broadcast_to(column[None, :], matrix.shape)
    if score == "fisher":
        return np.outer(*(_factor(scores, score, axis, matrix) for axis in ("row", "column")))
    if weights is None:
        raise UserError(f"shield.granularity: element needs the weights for score {score}; give the model's directory")
    values = absolute_weights(weights, matrix)
    if score != "magnitude":
        statistic = INPUT_NORM if score == "wanda" else INPUT_MEAN_SQUARE
        values *= _factor(scores, statistic, "column", matrix)[None, :].astype(values.dtype)
    return values


def absolute_weights(weights: Weights, matrix: Matrix) -> np.ndarray:
    """|W| [shape] as float32 (float64 stays); UserError naming the matrix when one is NaN or infinite."""
    import torch  # late: most shields are planned without a weight

    weight = weights(matrix.name)
    if tuple(weight.shape) != matrix.shape:
        raise UserError(f"{matrix.name}: the weight is {tuple(weight.shape)}, the scores file says {matrix.shape}")
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    values = weight.detach().to("cpu", dtype, copy=True).abs_().numpy()
    if not np.isfinite(values).all():
        raise UserError(f"{matrix.name}: the weights hold NaN or infinite values; look for a broken checkpoint")
    return values


def _factor(scores: Scores, score: str, axis: Literal["column", "row"], matrix: Matrix) -> np.ndarray:
    """float32 [I] or [O], scaled so that products neither overflow nor vanish."""
    values = scores.get(score, axis, matrix.name)
    _, exponent = np.frexp(values.max(initial=0.0))
    return np.ldexp(values, -exponent).astype(np.float32)


def _counts(scores: Scores, options: PlanOptions, planned: Mapping[str, Matrix]) -> dict[str, int]:
    """Units to freeze, by matrix."""
    if options.budget == "uniform":
        return uniform_counts(planned, options.granularity, options.ratio)
    if options.budget == "per-kind":
        return per_kind_counts(planned, options.granularity, options.ratio, options.kinds)
    # Elements add up to the column scores, so those tell a matrix's importance at every granularity but row.
    axis: Literal["column", "row"] = "row" if options.granularity == "row" else "column"
    means = {
        name: float(axis_scores(scores, options.score, axis, matrix, options.seed).sum()) / matrix.elements
        for name, matrix in planned.items()
    }
    return layerwise_counts(planned, options.granularity, options.ratio, means, options.floor, options.ceiling)


def _plan_norms(
    scores: Scores, options: PlanOptions, weights: Weights | None, masks: dict[str, Mask]
) -> dict[str, str]:
    """Add the norms' masks; returns what the header should tell of it.

    half: the top half of each norm's elements by |w| (1 + importance). The importance of an element is the mean square
    of the norm's input feature over the greatest of that norm (from the statistic input_norm of the norm, when the
    scores file has it), in [0, 1]; without that statistic it is 0, elements are ranked by |w|, header and log say so.
    """
    norms = [m for _, m in sorted(scores.matrices.items()) if m.kind == "norm"]
    if options.norms == "trainable":
        return {}
    if not norms:
        raise UserError(
            f"shield.norms: {options.norms} asked for, but the scores file of {scores.model} lists no norms"
        )
    if options.norms == "frozen":
        masks.update({m.name: Mask.constant("element", m.shape, True) for m in norms})
        return {}
    if weights is None:
        raise UserError("shield.norms: half needs the norms' weights; give the model's directory")
    measured = [m.name for m in norms if scores.has(INPUT_NORM, "column", m.name)]
    if measured and len(measured) < len(norms):
        missing = next(m.name for m in norms if m.name not in measured)
        raise UserError(f"shield.norms: half: the scores file has {INPUT_NORM} of some norms but not of {missing}")
    if not measured:
        log.warning("shield.norms half: no statistics of the norms' inputs in the scores file, ranking by |w| alone")
    for matrix in norms:
        values = absolute_weights(weights, matrix).astype(np.float64)
        if measured:
            norm = scores.column(INPUT_NORM, matrix.name)
            values *= 1 + (norm / max(norm.max(initial=0.0), np.finfo(np.float64).tiny)) ** 2
        masks[matrix.name] = Mask.of("element", matrix.shape, freeze_top(values, matrix.elements // 2))
    return {"norm_importance": "input_norm" if measured else "none"}


def _row_mask(matrices: Mapping[str, Matrix], name: str, shape: tuple[int, ...], rows: list[int]) -> Mask:
    """A mask of whole rows of embedding or head."""
    if name not in matrices:
        raise UserError(f"special tokens: {name} is not among the scores file's matrices; score the model again")
    if tuple(shape) != matrices[name].shape:
        raise UserError(f"special tokens: {name} is {tuple(shape)}, the scores file says {matrices[name].shape}")
    outside = [row for row in rows if not 0 <= row < shape[0]]
    if outside:
        raise UserError(f"special tokens: row {outside[0]} is outside {name}, which has {shape[0]} rows")
    frozen = np.zeros(shape[0], dtype=bool)
    frozen[list(rows)] = True
    return Mask.of("row", tuple(shape), frozen)


def protected(matrices: Mapping[str, Matrix], rules: Sequence[ProtectRule]) -> dict[str, str]:
    """Matrix name -> 'frozen' or 'trainable', by the last rule that fits it; UserError for a rule that fits nothing."""
    result: dict[str, str] = {}
    for rule in rules:
        names = select(matrices, rule.pattern)
        result.update(dict.fromkeys(names, rule.action))
    return dict(sorted(result.items()))


def select(matrices: Mapping[str, Matrix], pattern: str) -> list[str]:
    """Names that a selector fits (see ProtectRule). UserError when there are none."""
    if pattern in SELECTORS:
        names = [n for n, m in matrices.items() if m.kind in SELECTORS[pattern]]
    elif pattern.startswith("layers:"):
        first, _, last = pattern.removeprefix("layers:").partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise UserError(f"shield.protect: {pattern!r} is no range of layers; write layers:3 or layers:0-3")
        low, high = int(first), int(last or first)
        layers = [m.layer for m in matrices.values() if m.layer is not None]
        if not layers or low > high or high > max(layers):
            raise UserError(
                f"shield.protect: {pattern!r} reaches outside layers 0-{max(layers, default=0)} of the model"
            )
        names = [n for n, m in matrices.items() if m.layer is not None and low <= m.layer <= high]
    else:
        names = [n for n in matrices if fnmatch.fnmatchcase(n, pattern)]
    if not names:
        hint = f"use {', '.join(SELECTORS)}, layers:0-3 or a pattern such as *.o_proj.weight"
        raise UserError(f"shield.protect: {pattern!r} fits no weight of the model; {hint}")
    return names


def _plain_granularity(matrix: Matrix, options: PlanOptions) -> Granularity:
    """The cheapest granularity for a mask that is all or nothing."""
    if len(matrix.shape) != 2:
        return "element"
    if not matrix.scored or options.granularity == "row":
        return "row"
    return "column"


def _plan_header(options: PlanOptions) -> dict[str, Any]:
    """The further choices that the masks depend on, as JSON; others are left out, so that they change no byte."""
    header: dict[str, Any] = {"norms": options.norms}
    if options.protect:
        header["protect"] = [asdict(rule) for rule in options.protect]
    if options.budget == "per-kind":
        header["kinds"] = {kind: float(ratio) for kind, ratio in options.kinds.items()}
    if options.budget == "layerwise":
        header |= {"floor": float(options.floor), "ceiling": float(options.ceiling)}
    if options.score == "random":
        header["seed"] = options.seed
    return header
