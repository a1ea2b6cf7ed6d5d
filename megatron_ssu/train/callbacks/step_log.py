"""Console lines and metrics: what was measured in a step or an evaluation, and which checkpoints are complete."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ssu.train.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron_ssu.train.loop import Loop
    from megatron_ssu.train.trainer import Step


class StepLog(Callback):
    """Hands the loop's numbers to its telemetry."""

    def on_step(self, loop: Loop, step: Step) -> None:
        record: dict[str, Any] = {"loss": step.loss, "grad_norm": step.grad_norm, "lr": step.lr}
        record |= step.terms | step.update_norms
        if step.skipped:
            record["skipped"] = True
        loop.telemetry.step(loop.progress.iteration, record, loop.trainer.times.take())

    def on_evaluation(self, loop: Loop, losses: dict[str, float]) -> None:
        loop.telemetry.evaluation(loop.progress.iteration, losses)

    def on_checkpoint(self, loop: Loop, path: Path) -> None:
        loop.telemetry.say(f"checkpoint {path}")
