"""Losses of the validation sets: before the first step, every train.eval_interval steps, and at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_ssu.train.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron_ssu.train.loop import Loop
    from megatron_ssu.train.trainer import Step


class Evaluation(Callback):
    """Evaluates when it is due; not where the run was asked to stop."""

    def on_start(self, loop: Loop) -> None:
        if loop.progress.iteration == 0:
            self._evaluate(loop)

    def on_step_end(self, loop: Loop, step: Step) -> None:
        if loop.last or (not loop.stop and loop.due(loop.run.train.eval_interval)):
            self._evaluate(loop)

    def _evaluate(self, loop: Loop) -> None:
        with loop.trainer.times("evaluation"):
            losses = {name: loop.trainer.evaluate(data) for name, data in loop.datasets.watched.items()}
        loop.emit("on_evaluation", losses)
