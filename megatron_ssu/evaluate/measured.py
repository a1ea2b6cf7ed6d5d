"""What an evaluation found: figures with the numbers per item that they are sums of, and forgetting against the source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RESAMPLES = 2000
_SEED = 1234
_INTERVAL = (2.5, 97.5)  # percentiles


@dataclass
class Measured:
    """One figure of one model: sum(numerators) / sum(denominators), an item each of a text, a chat or a question.

    Where the items are not known (a task's own aggregation), both are empty and `value` alone says it.
    """

    data: str  # name of the data or task
    metric: str
    value: float
    better: str | None  # higher, lower; None: neither
    numerators: Sequence[float] = ()
    denominators: Sequence[float] = ()
    facts: dict[str, Any] = field(default_factory=dict)  # what it was measured on and with, as JSON

    @property
    def items(self) -> int:
        return len(self.numerators)


def ratio(
    data: str, metric: str, better: str | None, numerators: Sequence[float], denominators: Sequence[float] | None = None
) -> Measured:
    """The figure of these items; without denominators their mean. NaN where there is nothing to divide by."""
    below = [1.0] * len(numerators) if denominators is None else list(denominators)
    total = float(np.sum(below))
    value = float(np.sum(numerators)) / total if total else float("nan")
    return Measured(data, metric, value, better, list(numerators), below)


@dataclass(frozen=True)
class Change:
    """How much worse than the source a figure is, in per cent of the source's: forgetting; negative where it is better.

    `low`, `high`: bootstrap interval of 95 % over items, of which both models have the same; None where they are not known.
    """

    percent: float
    low: float | None
    high: float | None


def change(source: Measured, model: Measured) -> Change | None:
    """None where a figure has no better direction, or the source's is 0."""
    if model.better is None or not source.value or not np.isfinite(source.value):
        return None
    sign = -1.0 if model.better == "higher" else 1.0

    def percent(before: Any, after: Any) -> Any:
        return sign * 100.0 * (after - before) / before

    found = float(percent(source.value, model.value))
    low = high = None
    if source.items and source.items == model.items:
        with np.errstate(divide="ignore", invalid="ignore"):
            resampled = percent(*(_resampled(m) for m in (source, model)))
        resampled = resampled[np.isfinite(resampled)]
        if resampled.size:
            low, high = (float(x) for x in np.percentile(resampled, _INTERVAL))
    return Change(found, low, high)


def interval(measured: Measured) -> tuple[float, float] | None:
    """Bootstrap interval of 95 % of a figure; None where its items are not known."""
    if measured.items < 2:
        return None
    values = _resampled(measured)
    values = values[np.isfinite(values)]
    if not values.size:
        return None
    low, high = np.percentile(values, _INTERVAL)
    return float(low), float(high)


def _resampled(measured: Measured) -> np.ndarray:
    """The figure of RESAMPLES draws of the items with replacement: the same draws for every model."""
    above, below = np.asarray(measured.numerators), np.asarray(measured.denominators)
    draw = np.random.default_rng(_SEED)
    found = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        chosen = draw.integers(0, above.size, above.size)
        total = below[chosen].sum()
        found[number] = above[chosen].sum() / total if total else np.nan
    return found
