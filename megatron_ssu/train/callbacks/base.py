"""What a callback of the training loop is: a class for one concern, with the events that it needs.

The loop calls every callback, in the order of its list, at every event:

    on_start                                     before the first step
    votes, on_votes, on_step, on_step_end        in every step
    on_evaluation, on_save, on_checkpoint        when a callback evaluated, handed a checkpoint over, completed one
    on_stop                                      before an error ends training between two steps
    on_end                                       after the last step

All ranks call the same events in the same order; an event may be collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ssu.train.loop import Loop
    from megatron_ssu.train.trainer import Step


class Callback:
    """Does nothing at any event."""

    def votes(self) -> list[float]:
        """Numbers of this rank that are summed over all ranks with the step's loss; always as many."""
        return []

    def on_votes(self, sums: Sequence[float]) -> None:
        """Takes the sums of `votes`, before `on_step`."""

    def on_start(self, loop: Loop) -> None:
        """Called once, before the first step."""

    def on_step(self, loop: Loop, step: Step) -> None:
        """Called after a step, when `loop.progress` counts it and `loop.stop` is decided."""

    def on_step_end(self, loop: Loop, step: Step) -> None:
        """Called when every callback has seen the step: the place for what takes its time."""

    def on_evaluation(self, loop: Loop, losses: dict[str, float]) -> None:
        """Called after an evaluation, with the mean loss per token of every validation set."""

    def on_save(self, loop: Loop) -> None:
        """Called when training can continue after a save; in the background it may still be written."""

    def on_checkpoint(self, loop: Loop, path: Path) -> None:
        """Called when the checkpoint at `path` is complete."""

    def on_stop(self, loop: Loop) -> None:
        """Called before an error ends training between two steps."""

    def on_end(self, loop: Loop) -> None:
        """Called after the last step, and where the run was asked to stop."""
