"""Rules over figures while a run goes on: when it is to end, and which checkpoint is the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ssu.config.schema import BestSection, RuleSection

LOWER = ("source_valid_loss", "target_valid_loss")  # of which less is better


@dataclass(frozen=True)
class Figure:
    """A value, and which direction is better: higher, lower."""

    value: float
    better: str


Figures = Mapping[str, Figure]


def worse_by(rule: RuleSection, start: Mapping[str, float], now: Figures) -> float | None:
    """How much worse than at the start the rule's figure is, in per cent; None where that cannot be said."""
    figure, before = now.get(rule.figure), start.get(rule.figure)
    if figure is None or not before:
        return None
    change = 100 * (figure.value - before) / abs(before)
    return change if figure.better == "lower" else -change


def met(rule: RuleSection, start: Mapping[str, float], now: Figures) -> bool:
    """Whether the figure has become worse by more than the rule allows."""
    found = worse_by(rule, start, now)
    return found is not None and found > rule.worse_by


def better(section: BestSection, start: Mapping[str, float], best: float | None, now: Figures) -> bool:
    """Whether what there is now is better than the `best` value so far (None: none yet)."""
    figure = now.get(section.figure)
    if figure is None or (section.unless is not None and met(section.unless, start, now)):
        return False
    if best is None:
        return True
    return figure.value < best if figure.better == "lower" else figure.value > best
