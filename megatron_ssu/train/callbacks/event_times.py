"""Seconds spent outside steps; a step's own are logged with its loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_ssu.train.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron_ssu.train.loop import Loop


class EventTimes(Callback):
    """Records the seconds of evaluations and saves by what they went to."""

    def on_evaluation(self, loop: Loop, losses: dict[str, float]) -> None:
        self._record(loop)

    def on_save(self, loop: Loop) -> None:
        self._record(loop)

    def _record(self, loop: Loop) -> None:
        taken = loop.trainer.times.take()
        loop.telemetry.record(loop.progress.iteration, {f"seconds_{k}": round(v, 6) for k, v in taken.items()})
