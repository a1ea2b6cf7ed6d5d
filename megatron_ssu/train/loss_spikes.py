"""Detection of loss spikes."""

from __future__ import annotations

import math
from collections import deque


class SpikeWatch:
    """Tells losses that lie more than `sigma` standard deviations above the mean of the last ones."""

    WINDOW, LEAST = 128, 16

    def __init__(self, sigma: float) -> None:
        self._sigma = sigma
        self._losses: deque[float] = deque(maxlen=self.WINDOW)

    def jump(self, loss: float) -> tuple[float, float] | None:
        """(mean, standard deviation) of the losses before where `loss` is a spike, else None; then remembers it."""
        if not math.isfinite(loss):
            return None
        found = None
        if self._sigma > 0 and len(self._losses) >= self.LEAST:
            mean = math.fsum(self._losses) / len(self._losses)
            spread = math.sqrt(math.fsum((x - mean) ** 2 for x in self._losses) / len(self._losses))
            if loss > mean + self._sigma * max(spread, 1e-3 * abs(mean)):
                found = (mean, spread)
        self._losses.append(loss)
        return found
