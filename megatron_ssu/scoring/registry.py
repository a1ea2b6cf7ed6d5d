"""The list of scores, and what is asked of it by name. Imports no torch: run files are checked by it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_ssu.errors import UserError
from megatron_ssu.models.matrix import Matrix
from megatron_ssu.scoring.base import Score
from megatron_ssu.scoring.change import CHANGE
from megatron_ssu.scoring.drawn import RANDOM
from megatron_ssu.scoring.fisher import FISHER
from megatron_ssu.scoring.magnitude import MAGNITUDE, MAGNITUDE_RELEASED
from megatron_ssu.scoring.snr import SNR
from megatron_ssu.scoring.sparsegpt import SPARSEGPT_DIAGONAL, SPARSEGPT_DIAGONAL_RELEASED
from megatron_ssu.scoring.target_contrast import TARGET_CONTRAST
from megatron_ssu.scoring.wanda import WANDA, WANDA_RELEASED


def by_name(scores: Sequence[Score]) -> dict[str, Score]:
    """Raises ValueError for two of one name."""
    names = [score.name for score in scores]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"two scores are called {doubled[0]}")
    return dict(zip(names, scores, strict=True))


SCORES: dict[str, Score] = by_name(
    (
        WANDA,
        WANDA_RELEASED,
        TARGET_CONTRAST,
        MAGNITUDE,
        MAGNITUDE_RELEASED,
        SPARSEGPT_DIAGONAL,
        SPARSEGPT_DIAGONAL_RELEASED,
        FISHER,
        CHANGE,
        SNR,
        RANDOM,
    )
)


def score_named(name: str, key: str = "shield.score") -> Score:
    """Raises UserError, listing what there is, for an unknown score; `key` is the run file's that names it."""
    if name not in SCORES:
        raise UserError(f"{key}: {name!r} is unknown; choose from {', '.join(SCORES)}")
    return SCORES[name]


def check_granularity(name: str, granularity: str) -> None:
    """Raises UserError, listing the scores that have it, for a score that does not rank by `granularity`."""
    score = score_named(name)
    if granularity not in score.granularities:
        having = ", ".join(other for other, entry in SCORES.items() if granularity in entry.granularities)
        raise UserError(
            f"shield.score: {name!r} has no {granularity} scores, only {', '.join(score.granularities)}; choose one of "
            f"{having}, or another shield.granularity"
        )


def check_experts(names: Iterable[str], matrices: Iterable[Matrix]) -> None:
    """Raises UserError for a score of gradients on a model with experts: a row's tokens meet in an expert with those of other
    rows, whose gradients cannot be separated."""
    backward = [name for name in names if score_named(name).needs == "backward"]
    if backward and any(matrix.kind == "router" for matrix in matrices):
        having = ", ".join(name for name, score in SCORES.items() if score.needs != "backward")
        raise UserError(f"shield.score: {backward[0]} is not supported on a model with experts; choose one of {having}")


def made_by_score(names: Iterable[str]) -> list[str]:
    """The scores of `names` that a `score` run computes, sorted: all but those that are drawn when a shield is planned."""
    return sorted({name for name in names if score_named(name).needs != "seed"})


def needing_calibration(names: Iterable[str]) -> list[str]:
    """Those that need a pass over calibration data."""
    return [name for name in names if score_named(name).needs_calibration]


def needing_target(names: Iterable[str]) -> list[str]:
    """Those that need a pass over target text too."""
    return [name for name in names if score_named(name).needs_target]


def needing_change(names: Iterable[str]) -> list[str]:
    """Those that compare with another checkpoint."""
    return [name for name in names if score_named(name).needs == "change"]
