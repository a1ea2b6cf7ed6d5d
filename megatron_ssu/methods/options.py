"""The shield section of a run file as the planner's options, and what of it can be checked without a score or a weight."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_ssu.config.schema import RunConfig
from megatron_ssu.errors import UserError
from megatron_ssu.models.family import Dims
from megatron_ssu.models.matrix import Matrix
from megatron_ssu.scoring import registry
from megatron_ssu.scoring.change import open_before
from megatron_ssu.shield.budget import kind_ratios, units_of_ratio
from megatron_ssu.shield.mask import Granularity, unit_count
from megatron_ssu.shield.plan import PlanOptions, check_options
from megatron_ssu.shield.select import ProtectRule, protected


def plan_options(run: RunConfig) -> PlanOptions:
    """The planner's options out of a run file."""
    section = run.shield
    return PlanOptions(
        score=section.score,
        granularity=section.granularity,
        budget=section.budget,
        ratio=section.ratio,
        freeze=section.freeze,
        kinds=section.kinds,
        floor=section.floor,
        ceiling=section.ceiling,
        seed=section.seed,
        protect=[ProtectRule(rule.pattern, rule.action) for rule in section.protect],
        norms=section.norms,
        biases=section.biases,
        reserve=list(section.reserve),
    )


def check_names(run: RunConfig) -> None:
    """Raises UserError for a score, granularity, budget or ratio that there is not, naming the key and what there is."""
    registry.score_named(run.shield.score)
    for name in run.shield.also_score:
        registry.score_named(name, "shield.also_score")
    check_options(plan_options(run))


def check_rules(run: RunConfig, matrices: Iterable[Matrix]) -> None:
    """Raises UserError for a rule of shield.protect or a kind of shield.kinds that fits none of the model's `matrices`."""
    options, by_name = plan_options(run), {matrix.name: matrix for matrix in matrices}
    registry.check_experts(wanted_scores(run), by_name.values())
    fixed = protected(by_name, options.protect)
    if options.budget == "per-kind":
        planned = {name: m for name, m in by_name.items() if m.scored and name not in fixed}
        kind_ratios(planned, options.ratio, options.kinds)


def wanted_scores(run: RunConfig) -> list[str]:
    """Scores that a `score` run computes: those named, without the ones that are drawn when a shield is planned."""
    return registry.made_by_score([run.shield.score, *run.shield.also_score])


def reads_calibration(run: RunConfig) -> str | None:
    """What of the run file needs a pass over source samples, in words; None where nothing does."""
    needing = registry.needing_calibration(wanted_scores(run))
    if needing:
        return f"the score {needing[0]!r}"
    return f"shield.norms: {run.shield.norms}" if run.shield.measures_norms else None


def reads_target(run: RunConfig) -> str | None:
    """What needs a pass over target text."""
    needing = registry.needing_target(wanted_scores(run))
    return f"the score {needing[0]!r}" if needing else None


def reads_change(run: RunConfig) -> str | None:
    """What compares with another checkpoint."""
    needing = registry.needing_change(wanted_scores(run))
    return f"the score {needing[0]!r}" if needing else None


def missing_calibration(why: str) -> UserError:
    """The error for source samples that `why` needs and the run file does not name."""
    weights = [n for n, score in registry.SCORES.items() if score.needs in ("weights", "seed")]
    return UserError(
        f"shield.calibration.path: missing; {why} reads source chat samples (JSONL); give them, or shield.file, "
        f"shield.scores, or a score of the weights alone ({', '.join(weights)})"
    )


def missing_target(why: str) -> UserError:
    """The error for target text that `why` needs and the run file does not name."""
    return UserError(f"shield.target_calibration.path: missing; {why} reads target text (JSONL); name a file of it")


def missing_change(why: str) -> UserError:
    """The error for a checkpoint that `why` needs and the run file does not name."""
    return UserError(
        f"shield.change_from: missing; {why} compares model.path with an earlier checkpoint; name its Hugging Face directory"
    )


def check_inputs(run: RunConfig, *, missing: bool) -> None:
    """Raises UserError where the run file lacks what its scores read, if scores are `missing`, or names another model with
    shield.change_from. Reads headers of weights only."""
    shield = run.shield
    for why, given, error in (
        (reads_calibration(run), shield.calibration.path, missing_calibration),
        (reads_target(run), shield.target_calibration.path, missing_target),
        (reads_change(run), shield.change_from, missing_change),
    ):
        if missing and why and not given:
            raise error(why)
    if shield.change_from is not None:
        open_before(run.model.path, shield.change_from)


def expected_fractions(run: RunConfig, matrices: Iterable[Matrix], dims: Dims) -> dict[str, tuple[Granularity, float]]:
    """By matrix: granularity and fraction that will be frozen, before there are scores; every matrix has shield.ratio.

    Which matrices or layers scores will choose is not known then: the frozen ones count as lying evenly over the layers, of all
    kinds in the same ones. Raises UserError as `check_names` does.
    """
    check_names(run)
    granularity, ratio = run.shield.granularity, run.shield.ratio
    by_name = {matrix.name: matrix for matrix in matrices}
    fixed = protected(by_name, plan_options(run).protect)
    count, found = units_of_ratio(ratio, dims.layers), {}
    for name, matrix in by_name.items():
        whole: Granularity = "column" if matrix.scored else "element"
        if name in fixed:
            if fixed[name] == "frozen":
                found[name] = (whole if len(matrix.shape) == 1 or matrix.scored else "row", 1.0)
            continue
        if matrix.layer is not None and granularity in ("matrix", "layer"):
            frozen = (matrix.layer + 1) * count // dims.layers > matrix.layer * count // dims.layers
            if matrix.scored or (frozen and granularity == "layer"):
                found[matrix.name] = (whole, float(frozen))
        elif matrix.scored:
            units = unit_count(granularity, matrix.shape)
            found[matrix.name] = (granularity, units_of_ratio(ratio, units) / units)  # type: ignore[assignment]
    return found
