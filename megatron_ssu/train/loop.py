"""The training loop: steps from where a run is to its last iteration, or until it is asked to stop.

What happens around the steps (logs, evaluations, checkpoints) is in callbacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from megatron_ssu.config.units import seconds
from megatron_ssu.data.blend import Blend
from megatron_ssu.data.loader import lost_loader
from megatron_ssu.errors import STATUS_RANK_LOST, TrainingStopped
from megatron_ssu.train.backends import backends
from megatron_ssu.train.callbacks.base import Callback
from megatron_ssu.train.callbacks.checkpoint_saver import CheckpointSaver
from megatron_ssu.train.callbacks.data_read import DataRead
from megatron_ssu.train.callbacks.evaluation import Evaluation
from megatron_ssu.train.callbacks.event_times import EventTimes
from megatron_ssu.train.callbacks.loss_spikes import LossSpikes
from megatron_ssu.train.callbacks.skipped_steps import SkippedSteps
from megatron_ssu.train.callbacks.step_log import StepLog
from megatron_ssu.train.checkpoints import Checkpoints, Progress
from megatron_ssu.train.identity import Identity
from megatron_ssu.train.stop_requests import STATUS, StopRequests, verdict
from megatron_ssu.train.telemetry import Telemetry
from megatron_ssu.train.trainer import Step, Trainer
from megatron_ssu.train.watchdog import Watchdog


@dataclass
class Datasets:
    """What a run reads: training samples, and validation sets by the name of the loss in the metrics."""

    train: Any
    watched: dict[str, Any] = field(default_factory=dict)
    train_digests: list[str] = field(default_factory=list)  # of the indexed datasets in `train`

    @property
    def blend(self) -> Blend | None:
        """The training samples, where they are a blend of parts."""
        return self.train if isinstance(self.train, Blend) else None


class Loop:
    """Steps from `progress` to train.iterations, with `callbacks` around them in their order."""

    def __init__(
        self,
        trainer: Trainer,
        datasets: Datasets,
        telemetry: Telemetry,
        progress: Progress,
        checkpoints: Checkpoints,
        callbacks: Sequence[Callback],
    ) -> None:
        self.trainer, self.run, self.datasets = trainer, trainer.run, datasets
        self.telemetry, self.progress, self.checkpoints = telemetry, progress, checkpoints
        self.callbacks = list(callbacks)
        self.stop: str | None = None  # by what the run is asked to stop
        self.save_now = False  # whether a callback asks for a checkpoint after this step
        self.first_sample = progress.samples  # of the step

    @property
    def last(self) -> bool:
        """Whether there is no step after this one."""
        return self.progress.iteration == self.run.train.iterations

    @property
    def where(self) -> str:
        """The step in words: its iteration and its samples."""
        return f"iteration {self.progress.iteration}, samples {self.first_sample} to {self.progress.samples - 1}"

    def due(self, interval: int) -> bool:
        """Whether something that happens every `interval` steps (0: never) happens after this one."""
        return interval > 0 and self.progress.iteration % interval == 0

    def emit(self, event: str, *arguments: Any) -> None:
        """Call `event` of every callback; see `Callback`."""
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)

    def train(self, requests: StopRequests) -> None:
        """Raises TrainingStopped where the run was asked to stop, or cannot continue."""
        self.emit("on_start")
        batches = self.trainer.batches(self.datasets.train, self.progress.samples)
        while self.progress.iteration < self.run.train.iterations:
            step = self._step(batches, requests)
            self.emit("on_step", step)
            self.emit("on_step_end", step)
            if self.stop and not self.last:
                break
        self.emit("on_end")
        iteration, iterations = self.progress.iteration, self.run.train.iterations
        if self.stop and iteration < iterations:
            raise TrainingStopped(
                f"stopped by {self.stop} after iteration {iteration} of {iterations}; the checkpoint "
                f"{self.checkpoints.path(iteration)} is complete: start again to resume",
                STATUS[self.stop],
            )

    def _step(self, batches: Any, requests: StopRequests) -> Step:
        """One step, counted; the ranks agree in it whether to stop."""
        progress, sizes = self.progress, [0]

        def votes() -> list[float]:
            own = [requests.votes(), *(callback.votes() for callback in self.callbacks)]
            sizes[:] = [len(numbers) for numbers in own]
            return [number for numbers in own for number in numbers]

        self.first_sample = progress.samples
        step = self.trainer.step(batches, votes, measure=self.telemetry.measures(progress.iteration + 1))
        progress.iteration += 1
        progress.samples += self.run.train.global_batch_size
        sums = iter(step.votes)
        mine, *theirs = [[next(sums) for _ in range(size)] for size in sizes]
        self.stop, self.save_now = verdict(mine), False
        for callback, numbers in zip(self.callbacks, theirs, strict=True):
            callback.on_votes(numbers)
        return step


def train(
    trainer: Trainer,
    identity: Identity,
    datasets: Datasets,
    telemetry: Telemetry,
    progress: Progress,
    started: float | None = None,
    *,
    evaluators: Sequence[Callback] = (),
    callbacks: Sequence[Callback] = (),
) -> Progress:
    """Train from `progress` to train.iterations; evaluates and saves on the way. Collective.

    `started` (time.monotonic) is when train.exit_after begins to count. `evaluators` come after the validation losses and
    before checkpoints, `callbacks` after the loop's own.
    Raises TrainingStopped where the run ends before.
    """
    run = trainer.run
    checkpoints = Checkpoints(run.checkpoint.directory, run.checkpoint.keep, background=run.checkpoint.async_save)
    own = (
        StepLog(),
        LossSpikes(run.train.spike_sigma),
        SkippedSteps(checkpoints),
        Evaluation(),
        *evaluators,
        CheckpointSaver(checkpoints, identity),
        DataRead(),
        EventTimes(),
    )
    loop = Loop(trainer, datasets, telemetry, progress, checkpoints, (*own, *callbacks))
    telemetry.say(backends(trainer.session.chunks, trainer.optimizer, trainer.session.config.attention_backend.name))
    watchdog = Watchdog(0.9 * 60 * run.parallel.timeout_minutes)
    trainer.mark = lambda doing: watchdog.mark(progress.iteration + 1, doing)
    trainer.waits = watchdog.waits
    with StopRequests(seconds(run.train.exit_after), started) as requests, watchdog:
        try:
            loop.train(requests)
        except (RuntimeError, dist.DistError) as error:
            who = lost_loader(error) or watchdog.lost(error)
            if who is None:
                raise
            raise TrainingStopped(f"iteration {progress.iteration + 1}: {who}", STATUS_RANK_LOST) from error
    return loop.progress
