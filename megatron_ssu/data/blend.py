"""The blend of the training data: which part each sample of a run comes from.

A sample is due when its part's cumulative share, the integral of its weight over the run, reaches the middle of it; the
order is that of the due times. So at any point of the run every part has had its share within about a sample, in samples or in
tokens, whatever the mesh, and a ramp of weights needs no steps.

The order can begin anew in the middle of a run, with other weights or other parts: each part continues after the last sample
that was read of it. What that takes is `state`, which checkpoints hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from megatron_ssu.config.schema import Ramp
from megatron_ssu.config.sources import weight_at
from megatron_ssu.data.parts import Part
from megatron_ssu.errors import UserError

_GRID = 1 << 12  # points between which a cumulative share is a straight line, under a ramp


@dataclass(frozen=True)
class Share:
    """A part of a blend: `key` identifies its documents and how they are packed, `path` the file."""

    key: str
    path: str
    weight: float | Ramp
    replay: float | Ramp | None = None  # of a part that is replayed: what all such parts together are of the whole

    @property
    def facts(self) -> list[Any]:
        found = [self.key, self.path, _plain(self.weight)]
        return found if self.replay is None else [*found, _plain(self.replay)]

    @property
    def ramped(self) -> bool:
        return isinstance(self.weight, Ramp) or isinstance(self.replay, Ramp)


@dataclass(frozen=True)
class Era:
    """A stretch of a run under the same weights: its first sample, and what had been read of each part before it."""

    start: int = 0
    drawn: dict[str, int] = field(default_factory=dict)  # samples by key


class Blend(Dataset):
    """The samples of a run, from the first of its era on."""

    def __init__(
        self,
        parts: Sequence[Part],
        shares: Sequence[Share],
        weights_in: str,
        samples: int,
        *,
        era: Era | None = None,
        reach: int = 0,
    ) -> None:
        """`samples`: of the whole run; up to `reach` can be read, under the weights of its end. Collective."""
        self.parts, self.shares, self.weights_in = list(parts), list(shares), weights_in
        self.samples, self.era = samples, era or Era()
        self._first = np.array([self.era.drawn.get(share.key, 0) for share in shares], dtype=np.int64)
        self._length = max(samples - self.era.start, 1)
        self._order, self._numbers = self._drawn(max(reach - self.era.start, self._length))
        for part, needed in zip(self.parts, self.drawn(len(self)), strict=True):
            part.reserve(int(max(needed, 1)))

    def __len__(self) -> int:
        return self.era.start + len(self._order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        at = index - self.era.start
        if not 0 <= at < len(self._order):
            raise IndexError(index)
        return self.parts[self._order[at]][int(self._numbers[at])]

    def drawn(self, samples: int) -> np.ndarray:
        """int64 [parts]: how many samples of each part are among the first `samples` of the run."""
        return self._first + np.bincount(self._order[: max(samples - self.era.start, 0)], minlength=len(self.parts))

    def state(self, samples: int) -> dict[str, Any]:
        """What continues the blend after `samples`, as JSON."""
        keys = [share.key for share in self.shares]
        return {
            "shares": [share.facts for share in self.shares],
            "weights_in": self.weights_in,
            "samples": self.samples if self._ramped else None,
            "era": [self.era.start, self.era.drawn],
            # of parts that are not read any more as well: they may come back
            "drawn": {**self.era.drawn, **dict(zip(keys, self.drawn(samples).tolist(), strict=True))},
        }

    def read(self, samples: int) -> list[dict[str, Any]]:
        """By part, of the first `samples` of the run: path, a name of its own, samples, tokens without padding, epochs."""
        found: list[dict[str, Any]] = []
        for part, share, count in zip(self.parts, self.shares, self.drawn(samples).tolist(), strict=True):
            tokens = part.total_tokens(count)
            epochs = tokens / max(part.tokens_per_epoch, 1)
            again = sum(other["path"] == share.path for other in found)
            name = f"{share.path} #{again + 1}" if again else share.path  # a path may be read in two ways
            found.append(
                {"path": share.path, "name": name, "samples": count, "tokens": tokens, "epochs": round(epochs, 4)}
            )
        return found

    @property
    def _ramped(self) -> bool:
        return any(share.ramped for share in self.shares)

    def _drawn(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """int16 [count], int64 [count]: part, and number within the part, of the era's samples."""
        if len(self.parts) == 1:
            return np.zeros(count, np.int16), np.arange(count, dtype=np.int64) + self._first[0]
        if self.weights_in == "samples":
            points, shares = self._cumulative(float(self._length))
            ends = [_extended(points, share, float(count + len(self.parts))) for share in shares]
            return self._merged(count, float(self._length), [np.ones(int(end) + 2, dtype=np.int64) for end in ends])
        total = self._expected_tokens()
        for _ in range(8):  # the run's tokens follow from the order, and the order, under a ramp, from them
            sizes = [self._sizes(part, total * count / self._length) for part in range(len(self.parts))]
            order, numbers = self._merged(count, total, sizes)
            run = order[: self._length], numbers[: self._length]
            tokens = sum(float(size[run[1][run[0] == p] - self._first[p]].sum()) for p, size in enumerate(sizes))
            if not self._ramped or abs(tokens - total) <= 1e-3 * total:
                break
            total = tokens
        return order, numbers

    def _weights(self, at: np.ndarray) -> np.ndarray:
        """float64 [parts, points]: weights at fractions `at` of the run, which add up to 1 at each of them."""
        rows = [np.array([weight_at(s.weight, f) for f in at]) for s in self.shares]
        if self.weights_in == "epochs":
            rows = [row * part.tokens_per_epoch for row, part in zip(rows, self.parts, strict=True)]
        weights, replayed = np.stack(rows), np.array([share.replay is not None for share in self.shares])
        if not replayed.any() or replayed.all():
            return weights / weights.sum(axis=0)
        fraction = np.array([weight_at(self.shares[int(np.argmax(replayed))].replay or 0.0, f) for f in at])
        for group, whole in ((replayed, fraction), (~replayed, 1 - fraction)):
            weights[group] *= whole / weights[group].sum(axis=0)
        return weights

    def _cumulative(self, total: float) -> tuple[np.ndarray, np.ndarray]:
        """Points [n] of the era in [0, total], and each part's cumulative share [parts, n] there."""
        if not self._ramped:
            return np.array([0.0, total]), np.outer(self._weights(np.zeros(1))[:, 0], [0.0, total])
        points = np.linspace(0.0, total, _GRID + 1)
        middle = (points[:-1] + points[1:]) / 2 / total
        begin = self.era.start / self.samples
        steps = self._weights(begin + (1 - begin) * middle) * (total / _GRID)
        return points, np.concatenate([np.zeros((len(self.parts), 1)), np.cumsum(steps, axis=1)], axis=1)

    def _merged(self, count: int, total: float, sizes: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The first `count` samples by due time, in an era of length `total`; `sizes`: what parts' samples take of it."""
        middles = [np.cumsum(size) - size / 2 for size in sizes]
        if self._ramped:
            points, shares = self._cumulative(total)
            due = [_inverse(points, share, middle) for share, middle in zip(shares, middles, strict=True)]
        else:  # the same to the last bit in a longer run
            due = [middle / weight for weight, middle in zip(self._weights(np.zeros(1))[:, 0], middles, strict=True)]
        parts = [np.full(len(size), part, dtype=np.int16) for part, size in enumerate(sizes)]
        numbers = [first + np.arange(len(size), dtype=np.int64) for first, size in zip(self._first, sizes, strict=True)]
        order = np.argsort(np.concatenate(due), kind="stable")[:count]
        return np.concatenate(parts)[order], np.concatenate(numbers)[order]

    def _expected_tokens(self) -> float:
        """About how many tokens the era's samples hold."""
        weights = self._weights(np.linspace(self.era.start / self.samples, 1, 65)).mean(axis=1)
        per_sample = np.array([part.tokens_per_epoch / part.samples_per_epoch for part in self.parts])
        return float(self._length / (weights / per_sample).sum())

    def _sizes(self, part: int, total: float) -> np.ndarray:
        """Tokens of the part's samples that an era of `total` tokens may begin with: more of them than it has."""
        found, first = self.parts[part], int(self._first[part])
        mean = found.tokens_per_epoch / found.samples_per_epoch
        share = self._cumulative(total)[1][part, -1]
        count = int(1.1 * share / mean + found.samples_per_epoch) + 2
        return found.tokens(first + count)[first:]


def _extended(points: np.ndarray, share: np.ndarray, at: float) -> float:
    """The cumulative `share` at `at`, which may be beyond the last point."""
    slope = (share[-1] - share[-2]) / (points[-1] - points[-2])
    return float(np.interp(at, points, share) + max(at - points[-1], 0.0) * slope)


def _inverse(points: np.ndarray, share: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Where the cumulative `share`, a straight line between `points` and on after the last, reaches `values`."""
    slope = (share[-1] - share[-2]) / (points[-1] - points[-2])
    beyond = values > share[-1]
    found = np.interp(values, share, points)
    if beyond.any():
        later = points[-1] + (values - share[-1]) / slope if slope > 0 else np.full_like(values, np.inf)
        found = np.where(beyond, later, found)
    return found


def continued(
    saved: dict[str, Any] | None, shares: Sequence[Share], weights_in: str, samples: int, at: int
) -> tuple[Era, str]:
    """The era of a run that resumes after sample `at` of the blend `saved`, and what changed, in words; '' for nothing.

    Raises UserError where a file has other documents than it had.
    """
    if saved is None:
        return Era(), ""
    for share in shares:
        was = {key for key, path, *_ in saved["shares"] if path == share.path}
        if was and not was & {other.key for other in shares}:
            raise UserError(
                f"data.train: {share.path} has other documents, or is packed otherwise, than when the run began; restore it, "
                "or give the new text another name"
            )
    facts, ramped = [share.facts for share in shares], any(share.ramped for share in shares)
    same = (facts, weights_in) == (saved["shares"], saved["weights_in"])
    if same and saved["samples"] == (samples if ramped else None):
        start, drawn = saved["era"]
        return Era(start, dict(drawn)), ""
    shown = ", ".join(f"{path} {_shown(weight)}" for _, path, weight, *_ in facts)
    return Era(at, dict(saved["drawn"])), f"data.train changed: from sample {at} on {shown} (in {weights_in})"


def _plain(weight: float | Ramp) -> Any:
    return [weight.start, weight.end] if isinstance(weight, Ramp) else weight


def _shown(weight: Any) -> str:
    return f"{weight[0]:g} to {weight[1]:g}" if isinstance(weight, list) else f"{weight:g}"
