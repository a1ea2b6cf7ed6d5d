"""Points between two models: what each keeps of the source's ability and learns of the target's, and which of them are best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_ssu.errors import UserError
from megatron_ssu.evaluate.measured import Change, Measured, change


@dataclass(frozen=True)
class Point:
    """A model and its two figures."""

    name: str
    alphas: Mapping[str, float]
    source: Measured  # of the source's ability
    target: Measured  # of the target's
    measured: tuple[Measured, ...]  # all of it


def forgetting(points: Sequence[Point], point: Point) -> Change:
    """How much worse than the first point, the source, a point is in the source's ability.

    Raises UserError where that cannot be said, since the source's figure is 0.
    """
    found = change(points[0].source, point.source)
    if found is None:
        raise UserError(
            f"--source-figure: {point.source.data}:{point.source.metric} is {points[0].source.value:g} of the source, so "
            "nothing can be forgotten; name another figure"
        )
    return found


def front(points: Sequence[Point]) -> list[Point]:
    """The Pareto front: points than which none is better in one figure and at least as good in the other."""
    return [p for p in points if not any(_beats(q, p) for q in points)]


def choose(points: Sequence[Point], keep: float) -> Point:
    """The best in the target's figure of those that forget at most `keep` per cent; the first, the source, always does."""
    kept = [p for p in points if p is points[0] or forgetting(points, p).percent <= keep]
    return max(kept, key=lambda p: _good(p.target))


def _good(m: Measured) -> float:
    return m.value if m.better == "higher" else -m.value


def _beats(one: Point, other: Point) -> bool:
    a, b = ((_good(p.source), _good(p.target)) for p in (one, other))
    return a != b and a[0] >= b[0] and a[1] >= b[1]
