"""The shield section of a run file as the planner's options, and what of it can be checked without a score or a weight."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_ssu.config.schema import RunConfig
from megatron_ssu.models.matrix import Matrix
from megatron_ssu.scoring import base
from megatron_ssu.shield.budget import per_kind_counts
from megatron_ssu.shield.plan import PlanOptions, ProtectRule, check_options, protected


def plan_options(run: RunConfig) -> PlanOptions:
    """The planner's options out of a run file."""
    section = run.shield
    return PlanOptions(
        score=section.score,
        granularity=section.granularity,  # type: ignore[arg-type]
        budget=section.budget,
        ratio=section.ratio,
        kinds=section.kinds,
        floor=section.floor,
        ceiling=section.ceiling,
        seed=section.seed,
        protect=[ProtectRule(rule.pattern, rule.action) for rule in section.protect],
        norms=section.norms,
    )


def check_names(run: RunConfig) -> None:
    """Raises UserError for a score, granularity, budget or ratio that there is not, naming the key and what there is."""
    base.check_names([run.shield.score])
    base.check_names(run.shield.also_score, "shield.also_score")
    check_options(plan_options(run))


def check_rules(run: RunConfig, matrices: Iterable[Matrix]) -> None:
    """Raises UserError for a rule of shield.protect or a kind of shield.kinds that fits none of the model's `matrices`."""
    options, by_name = plan_options(run), {matrix.name: matrix for matrix in matrices}
    fixed = protected(by_name, options.protect)
    if options.budget == "per-kind":
        planned = {name: m for name, m in by_name.items() if m.scored and name not in fixed}
        per_kind_counts(planned, options.granularity, options.ratio, options.kinds)
