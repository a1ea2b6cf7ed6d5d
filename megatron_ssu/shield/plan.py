"""Scores and a budget become a shield: pure functions on numpy arrays, the same on every machine and mesh.

By `matrix` whole matrices are ranked within each kind (all q_proj, ...), and floor(ratio * count) of each kind are frozen. By
`layer` whole layers are ranked, and floor(ratio * count) of them are frozen, with their norms. How ties are broken: ranking.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from megatron_ssu.errors import UserError
from megatron_ssu.models.matrix import Matrix
from megatron_ssu.scoring.registry import check_granularity, score_named
from megatron_ssu.scoring.scores_file import INPUT_MEAN_SQUARE, INPUT_NORM, Scores, random_bits
from megatron_ssu.shield.budget import (
    BUDGETS,
    check_ratio,
    kind_ratios,
    layerwise_counts,
    per_kind_counts,
    uniform_counts,
    units_of_ratio,
)
from megatron_ssu.shield.mask import GRANULARITIES as MASK_GRANULARITIES
from megatron_ssu.shield.mask import Granularity, Mask
from megatron_ssu.shield.pack_file import Pack
from megatron_ssu.shield.ranking import (
    ENDS,
    Weights,
    absolute_weights,
    axis_scores,
    by_layer,
    element_scores,
    freeze_units,
    layer_scores,
    matrix_score,
)
from megatron_ssu.shield.reserved import Reserved, open_reserved
from megatron_ssu.shield.select import ProtectRule, protected
from megatron_ssu.shield.shield_file import Shield

log = logging.getLogger(__name__)

GRANULARITIES = (*MASK_GRANULARITIES, "matrix", "layer")
NORMS = ("trainable", "frozen", "half", "half-released")
BIASES = ("trainable", "frozen", "half")


@dataclass(frozen=True)
class PlanOptions:
    """What to shield. Everything but `score`, `granularity` and `ratio` may stay as it is."""

    score: str = "wanda"
    granularity: str = "column"  # column, row, element, matrix, layer
    budget: str = "uniform"
    ratio: float = 0.5  # frozen fraction
    freeze: str = "highest"  # which end of the ranking is frozen: highest, lowest
    kinds: Mapping[str, float] = field(default_factory=dict)  # budget per-kind: attention, mlp or a kind -> ratio
    floor: float = 0.0  # budget layerwise: least and greatest frozen fraction of a matrix
    ceiling: float = 1.0
    seed: int = 1234  # of the score random, where the scores file has none
    protect: Sequence[ProtectRule] = ()  # a later rule goes before an earlier one
    norms: str = "trainable"  # trainable, frozen, half, half-released
    biases: str = "trainable"  # trainable, frozen, half
    # Shield files, of the model or of one that it was trained from, and packs: what they train or move is frozen.
    reserve: Sequence[str] = ()


def check_options(options: PlanOptions) -> None:
    """UserError, naming the key, for what is wrong whatever the scores are."""
    for key, value, known in (
        ("granularity", options.granularity, GRANULARITIES),
        ("budget", options.budget, BUDGETS),
        ("freeze", options.freeze, ENDS),
        ("norms", options.norms, NORMS),
        ("biases", options.biases, BIASES),
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
        raise UserError(f"shield.kinds: only applies to shield.budget: per-kind, not {options.budget}")
    budgets = {"matrix": ("uniform", "per-kind"), "layer": ("uniform",)}.get(options.granularity, BUDGETS)
    if options.budget not in budgets:
        raise UserError(
            f"shield.budget: must be {' or '.join(budgets)} with shield.granularity {options.granularity}, got "
            f"{options.budget}; change one of them"
        )
    if options.reserve and options.granularity not in MASK_GRANULARITIES:
        raise UserError(
            f"shield.reserve: goes with shield.granularity {', '.join(MASK_GRANULARITIES)}, got {options.granularity}; leave "
            "it out"
        )
    if options.budget == "layerwise" and options.freeze == "lowest":
        raise UserError(
            "shield.freeze: must be highest with shield.budget layerwise, which freezes most where scores are high; got "
            "lowest; change one of them"
        )
    check_granularity(options.score, options.granularity)
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
    before: Weights | None = None,
) -> Shield:
    """Choose what to freeze.

    scores: of all matrices; those of the seven linear kinds are planned, the others can be protected.
    frozen_rows: embedding or head name -> (shape, row numbers), the special tokens' rows.
    options.reserve: of every planned matrix the units that one of these shields trains, or packs moves, are frozen first, and
        count in what the budget gives it; where they are more than that, all of them are frozen. What packs move of other
        matrices (rows of embedding and head, elements of norms and biases) is frozen too.
    weights: matrix name -> tensor [shape] on the CPU; for element granularity of most scores, for norms 'half' and
        'half-released' and for biases 'half'. One matrix at a time is asked for and not kept.
    before: the same of the checkpoint that score `change` compares with, for element granularity.
    Protected matrices are outside the budget: it is spent over the rest. UserError for impossible options, scores
    that are missing, NaN or infinite (naming the matrix) and a rule that fits nothing.
    """
    check_options(options)
    fixed = protected(scores.matrices, options.protect)
    planned = {n: m for n, m in sorted(scores.matrices.items()) if m.scored and n not in fixed}
    reserved = Reserved([open_reserved(path) for path in options.reserve])
    if options.granularity in ("matrix", "layer"):
        masks = _whole_masks(scores, options, planned)
        frozen_norms = _frozen_layers(masks, scores.matrices) if options.granularity == "layer" else {}
    else:
        masks, frozen_norms = _unit_masks(scores, options, planned, reserved, weights, before), {}
    notes = _plan_norms(scores, options, weights, masks)
    _plan_biases(scores, options, weights, masks)
    masks |= frozen_norms
    for name, (shape, rows) in sorted((frozen_rows or {}).items()):
        masks[name] = _row_mask(scores.matrices, name, shape, rows)
    for matrix, mask in reserved.further(m for _, m in sorted(scores.matrices.items()) if not m.scored):
        masks[matrix.name] = _both(masks.get(matrix.name), mask)
    for name, action in fixed.items():
        matrix = scores.matrices[name]
        if action == "frozen" or matrix.scored:
            masks[name] = Mask.constant(_plain_granularity(matrix, options), matrix.shape, action == "frozen")
        else:
            masks.pop(name, None)
    reserved.check(masks, scores.matrices)
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
        plan=_plan_header(options, scores) | notes,
    )


def _unit_masks(
    scores: Scores,
    options: PlanOptions,
    planned: Mapping[str, Matrix],
    reserved: Reserved,
    weights: Weights | None,
    before: Weights | None,
) -> dict[str, Mask]:
    """Masks by column, row or element."""
    counts, masks = _counts(scores, options, planned), {}
    granularity: Granularity = options.granularity  # type: ignore[assignment]
    for name, matrix in planned.items():
        if granularity != "element":
            values = axis_scores(scores, options.score, granularity, matrix, options.seed)
        elif score_named(options.score).needs == "seed":
            values = random_bits(options.seed, name, granularity, matrix.elements)
        else:
            values = element_scores(scores, options.score, matrix, weights, before).reshape(-1)
        taken = reserved.units(matrix, granularity)
        masks[name] = Mask.of(granularity, matrix.shape, _frozen(values, counts[name], options, taken))
    return masks


def _frozen(values: np.ndarray, count: int, options: PlanOptions, taken: np.ndarray | None) -> np.ndarray:
    """bool [n]: the `taken` units and, up to `count` together, those that rank first of the others."""
    if taken is None:
        return freeze_units(values, count, options.freeze)
    frozen, free = taken.copy(), np.flatnonzero(~taken)
    frozen[free] = freeze_units(values[free], count - int(taken.sum()), options.freeze)
    return frozen


def _whole_masks(scores: Scores, options: PlanOptions, planned: Mapping[str, Matrix]) -> dict[str, Mask]:
    """Masks of whole matrices: by matrix of each kind, or by layer."""
    values = {n: matrix_score(scores, options.score, m, options.seed) for n, m in planned.items()}
    frozen: set[str] = set()
    if options.granularity == "layer":
        layers = layer_scores(values, planned)
        numbers, ranked = np.array(list(layers), dtype=np.int64), np.array(list(layers.values()))
        chosen = freeze_units(ranked, units_of_ratio(options.ratio, len(layers)), options.freeze)
        frozen.update(n for n, m in planned.items() if m.layer in numbers[chosen])
    else:
        ratios = kind_ratios(planned, options.ratio, options.kinds)
        for kind, ratio in ratios.items():
            members = [m.name for m in by_layer(planned) if m.kind == kind]
            ranked = np.array([values[name] for name in members])
            chosen = freeze_units(ranked, units_of_ratio(ratio, len(members)), options.freeze)
            frozen.update(name for name, yes in zip(members, chosen, strict=True) if yes)
    return {n: Mask.constant(_plain_granularity(m, options), m.shape, n in frozen) for n, m in planned.items()}


def _frozen_layers(masks: Mapping[str, Mask], matrices: Mapping[str, Matrix]) -> dict[str, Mask]:
    """Masks of the norms and biases of the layers that `masks` freeze."""
    layers = {matrices[name].layer for name, mask in masks.items() if mask.frozen_units}
    vectors = [
        m for _, m in sorted(matrices.items()) if len(m.shape) == 1 and m.layer is not None and m.layer in layers
    ]
    return {m.name: Mask.constant("element", m.shape, True) for m in vectors}


def _counts(scores: Scores, options: PlanOptions, planned: Mapping[str, Matrix]) -> dict[str, int]:
    """Units to freeze, by matrix."""
    if options.budget == "uniform":
        return uniform_counts(planned, options.granularity, options.ratio)
    if options.budget == "per-kind":
        return per_kind_counts(planned, options.granularity, options.ratio, options.kinds)
    # Elements add up to the column scores, so those give a matrix's importance at every granularity but row.
    axis: Literal["column", "row"] = "row" if options.granularity == "row" else "column"
    means = {
        name: float(axis_scores(scores, options.score, axis, matrix, options.seed).sum()) / matrix.elements
        for name, matrix in planned.items()
    }
    return layerwise_counts(planned, options.granularity, options.ratio, means, options.floor, options.ceiling)


def _plan_norms(
    scores: Scores, options: PlanOptions, weights: Weights | None, masks: dict[str, Mask]
) -> dict[str, str]:
    """Add the norms' masks; returns what the header should record of it.

    half: the top half of each norm's elements by |w| (1 + importance). The importance of an element is the mean square
    of the norm's input feature over the greatest of that norm (from the statistic input_norm of the norm, when the
    scores file has it), in [0, 1]; without that statistic it is 0, elements are ranked by |w|, header and log say so.
    half-released: the same with an importance of mean_t(x_j^2), not scaled, as the released code of arXiv 2512.04844.
    """
    norms = [m for _, m in sorted(scores.matrices.items()) if m.is_norm]
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
        raise UserError(f"shield.norms: {options.norms} needs the norms' weights; give the model's directory")
    released = options.norms == "half-released"
    needed = INPUT_MEAN_SQUARE if released else INPUT_NORM
    measured = [m.name for m in norms if scores.has(needed, "column", m.name)]
    if (measured or released) and len(measured) < len(norms):
        missing = next(m.name for m in norms if m.name not in measured)
        few = f"some norms but not of {missing}" if measured else "no norm"
        raise UserError(
            f"shield.norms: {options.norms}: the scores file has {needed} of {few}; score again with shield.norms: "
            f"{options.norms}"
        )
    if not measured:
        log.warning("shield.norms half: no statistics of the norms' inputs in the scores file, ranking by |w| alone")
    for matrix in norms:
        values = absolute_weights(weights, matrix, offset=float(matrix.kind == "centred_norm")).astype(np.float64)
        if released:
            values *= 1 + scores.column(needed, matrix.name)
        elif measured:
            norm = scores.column(INPUT_NORM, matrix.name)
            values *= 1 + (norm / max(norm.max(initial=0.0), np.finfo(np.float64).tiny)) ** 2
        masks[matrix.name] = Mask.of("element", matrix.shape, freeze_units(values, matrix.elements // 2))
    return {"norm_importance": needed if measured else "none"}


def _plan_biases(scores: Scores, options: PlanOptions, weights: Weights | None, masks: dict[str, Mask]) -> None:
    """Add the biases' masks; half: the half of each bias's elements with the greatest |b|. Biases have no columns to rank."""
    biases = [m for _, m in sorted(scores.matrices.items()) if m.kind == "bias"]
    if options.biases == "trainable":
        return
    if not biases:
        raise UserError(f"shield.biases: {options.biases} asked for, but {scores.model} has no biases; leave it out")
    if options.biases == "frozen":
        masks.update({m.name: Mask.constant("element", m.shape, True) for m in biases})
        return
    if weights is None:
        raise UserError("shield.biases: half needs the biases' values; give the model's directory")
    for matrix in biases:
        values = absolute_weights(weights, matrix).astype(np.float64)
        masks[matrix.name] = Mask.of("element", matrix.shape, freeze_units(values, matrix.elements // 2))


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


def _both(one: Mask | None, other: Mask) -> Mask:
    """Frozen in either."""
    if one is None:
        return other
    if one.granularity != other.granularity:
        one, other = one.to_elements(), other.to_elements()
    return Mask(one.granularity, one.shape, one.packed | other.packed)


def _plain_granularity(matrix: Matrix, options: PlanOptions) -> Granularity:
    """The cheapest granularity for a mask that is all or nothing."""
    if len(matrix.shape) != 2:
        return "element"
    if not matrix.scored or options.granularity == "row":
        return "row"
    return "column"


def choices(options: PlanOptions) -> dict[str, Any]:
    """The further choices that the masks depend on, as JSON; others are left out, so that they change no byte."""
    header: dict[str, Any] = {"norms": options.norms}
    if options.biases != "trainable":
        header["biases"] = options.biases
    if options.protect:
        header["protect"] = [asdict(rule) for rule in options.protect]
    if options.budget == "per-kind":
        header["kinds"] = {kind: float(ratio) for kind, ratio in options.kinds.items()}
    if options.budget == "layerwise":
        header |= {"floor": float(options.floor), "ceiling": float(options.ceiling)}
    if options.freeze != "highest":
        header["freeze"] = options.freeze
    if score_named(options.score).needs == "seed":
        header["seed"] = options.seed
    if options.reserve:
        header["reserve"] = [_digest(open_reserved(path)) for path in options.reserve]
    return header


def _digest(file: Shield | Pack) -> str:
    return file.digest if isinstance(file, Pack) else file.digest()


def _plan_header(options: PlanOptions, scores: Scores) -> dict[str, Any]:
    """`choices`, and what the scores were compared with."""
    header, entry = choices(options), score_named(options.score)
    if entry.needs == "change":
        header["change_from"] = scores.setting("change_from")["fingerprint"]
    if entry.needs_target:
        header["target_calibration"] = scores.setting("target_calibration")["digest"]
    return header
