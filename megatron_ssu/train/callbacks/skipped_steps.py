"""Steps whose loss or gradient norm was not finite: counted, logged with the samples they read, and too many in a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_ssu.engine.ranks import on_rank_zero
from megatron_ssu.errors import STATUS_NOT_FINITE, TrainingStopped
from megatron_ssu.train.callbacks.base import Callback
from megatron_ssu.train.checkpoints import Checkpoints

if TYPE_CHECKING:
    from megatron_ssu.train.loop import Loop
    from megatron_ssu.train.trainer import Step


class SkippedSteps(Callback):
    """Raises TrainingStopped after train.max_skipped skipped steps in a row, and names the last good checkpoint."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints

    def on_step(self, loop: Loop, step: Step) -> None:
        progress = loop.progress
        progress.skipped = progress.skipped + 1 if step.skipped else 0
        if not step.skipped:
            return
        what = f"loss {step.loss}, gradient norm {step.grad_norm}"
        loop.telemetry.warn(f"step skipped at {loop.where}: {what}; no weight moved ({progress.skipped} in a row)")
        if progress.skipped < loop.run.train.max_skipped:
            return
        loop.emit("on_stop")
        latest = on_rank_zero(self._checkpoints.latest)
        good = (
            f"the last good checkpoint is {self._checkpoints.path(latest)}" if latest else "there is no checkpoint yet"
        )
        raise TrainingStopped(
            f"{progress.skipped} steps in a row skipped, the last at {loop.where}: {what}; {good}; "
            "lower train.optimizer.lr or look at these samples",
            STATUS_NOT_FINITE,
        )
