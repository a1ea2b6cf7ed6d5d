"""What was read of each source: samples, tokens and epochs, recorded with every save and logged at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_ssu.train.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron_ssu.train.loop import Loop


class DataRead(Callback):
    """Counts what the blend of the training data has given so far, from the beginning of the run."""

    def on_save(self, loop: Loop) -> None:
        if loop.datasets.blend is None:
            return
        record = {
            f"{unit}_read/{found['name']}": found[unit]
            for found in loop.datasets.blend.read(loop.progress.samples)
            for unit in ("samples", "tokens", "epochs")
        }
        loop.telemetry.record(loop.progress.iteration, record)

    def on_end(self, loop: Loop) -> None:
        if loop.datasets.blend is None:
            return
        for found in loop.datasets.blend.read(loop.progress.samples):
            loop.telemetry.say(
                f"read of {found['name']}: {found['samples']:,} samples, {found['tokens']:,} tokens, "
                f"{found['epochs']:.4g} epochs"
            )
