"""Loss spikes: found by the losses before them, and logged with the samples that were read."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

from megatron_ssu.train.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron_ssu.train.loop import Loop
    from megatron_ssu.train.trainer import Step


class SpikeWatch:
    """Finds losses more than `sigma` standard deviations above the mean of the last ones."""

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


class LossSpikes(Callback):
    """Warns of a loss more than `sigma` standard deviations above the last ones; 0 warns of none."""

    def __init__(self, sigma: float) -> None:
        self._watch = SpikeWatch(sigma)

    def on_step(self, loop: Loop, step: Step) -> None:
        spike = self._watch.jump(step.loss)
        if spike is not None:
            mean, spread = spike
            loop.telemetry.warn(
                f"loss spike at {loop.where}: {step.loss:.4f}, the last ones {mean:.4f} +- {spread:.4f}"
            )
            loop.telemetry.record(loop.progress.iteration, {"spike": True})
