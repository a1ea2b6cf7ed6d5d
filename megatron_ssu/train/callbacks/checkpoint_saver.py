"""Checkpoints on the way: every checkpoint.interval steps, when a callback or a signal asks for one, and at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_ssu.train.callbacks.base import Callback
from megatron_ssu.train.checkpoints import Checkpoints
from megatron_ssu.train.identity import Identity

if TYPE_CHECKING:
    from megatron_ssu.train.loop import Loop
    from megatron_ssu.train.trainer import Step


class CheckpointSaver(Callback):
    """Saves when it is due, and completes what is written in the background as soon as every rank has written."""

    def __init__(self, checkpoints: Checkpoints, identity: Identity) -> None:
        self.checkpoints, self.identity = checkpoints, identity
        self._saved: int | None = None  # iteration of the newest
        self._busy = False  # whether a rank's writer was at work in the last step

    def votes(self) -> list[float]:
        return [float(self.checkpoints.busy)]

    def on_votes(self, sums: Sequence[float]) -> None:
        self._busy = sums[0] > 0

    def on_start(self, loop: Loop) -> None:
        self.checkpoints.mark = lambda: loop.trainer.mark("checkpoint")
        self._saved = loop.progress.iteration or None

    def on_step(self, loop: Loop, step: Step) -> None:
        if self.checkpoints.pending and not self._busy:
            self._finish_pending(loop)

    def on_step_end(self, loop: Loop, step: Step) -> None:
        if loop.last or loop.stop or loop.save_now or loop.due(loop.run.checkpoint.interval):
            self._save(loop)

    def on_stop(self, loop: Loop) -> None:
        self._finish_pending(loop)

    def on_end(self, loop: Loop) -> None:
        self._finish_pending(loop)

    def _save(self, loop: Loop) -> None:
        """Save, unless the newest checkpoint is of this iteration already."""
        trainer, progress = loop.trainer, loop.progress
        if self._saved == progress.iteration:
            return
        trainer.mark("checkpoint")
        if loop.datasets.blend is not None:
            progress.blend = loop.datasets.blend.state(progress.samples)
        with trainer.times("checkpoint"):
            self._finish_pending(loop)
            trainer.gather_weights()
            path = self.checkpoints.save(
                trainer.session, progress, self.identity, trainer.optimizer_state, trainer.method
            )
        self._saved = progress.iteration
        if not self.checkpoints.pending:
            loop.emit("on_checkpoint", path)
        loop.emit("on_save")

    def _finish_pending(self, loop: Loop) -> None:
        """Complete the checkpoint in the background, if there is one."""
        path = self.checkpoints.finish()
        if path is not None:
            loop.emit("on_checkpoint", path)
