"""The training loop: steps, evaluations and checkpoints from where a run is to its last iteration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from megatron_ssu.config.units import seconds
from megatron_ssu.data.loader import lost_loader
from megatron_ssu.engine.ranks import on_rank_zero
from megatron_ssu.errors import STATUS_NOT_FINITE, STATUS_RANK_LOST, TrainingStopped
from megatron_ssu.train.backends import backends
from megatron_ssu.train.checkpoints import Checkpoints, Progress
from megatron_ssu.train.identity import Identity
from megatron_ssu.train.loss_spikes import SpikeWatch
from megatron_ssu.train.stop_requests import STATUS, StopRequests, verdict
from megatron_ssu.train.telemetry import Telemetry
from megatron_ssu.train.trainer import Step, Trainer
from megatron_ssu.train.watchdog import Watchdog


@dataclass
class Datasets:
    """What a run reads: training samples, and what it watches, by the name of the loss in the metrics."""

    train: Any
    watched: dict[str, Any] = field(default_factory=dict)
    train_digests: list[str] = field(default_factory=list)  # of the indexed datasets in `train`


class Loop:
    """Steps from `progress` to train.iterations; evaluates and saves on the way."""

    def __init__(
        self, trainer: Trainer, identity: Identity, datasets: Datasets, telemetry: Telemetry, progress: Progress
    ) -> None:
        self.trainer, self.run, self.datasets = trainer, trainer.run, datasets
        self.telemetry, self.progress = telemetry, progress
        checkpoint = self.run.checkpoint
        self.checkpoints = Checkpoints(checkpoint.directory, checkpoint.keep, background=checkpoint.async_save)
        self.checkpoints.mark = lambda: trainer.mark("checkpoint")
        self.identity = identity
        self.spikes = SpikeWatch(self.run.train.spike_sigma)
        self.stop: str | None = None
        self.saved = progress.iteration if progress.iteration else None

    def work(self, requests: StopRequests) -> None:
        """Raises TrainingStopped where the run was asked to stop, or cannot go on."""
        progress, run, trainer = self.progress, self.run, self.trainer
        if progress.iteration == 0:
            self.evaluate()
        batches = trainer.batches(self.datasets.train, progress.samples)

        def votes() -> list[float]:
            return [*requests.votes(), float(self.checkpoints.busy)]

        while progress.iteration < run.train.iterations:
            first = progress.samples
            step = trainer.step(batches, votes, measure=self.telemetry.measures(progress.iteration + 1))
            progress.iteration += 1
            progress.samples += run.train.global_batch_size
            self.stop = verdict(step.votes[:-1])
            self.tell(step)
            self.watch(step, first)
            if self.checkpoints.pending and step.votes[-1] == 0:
                self.published()
            last = progress.iteration == run.train.iterations
            if last or (not self.stop and _due(progress.iteration, run.train.eval_interval)):
                self.evaluate()
            if last or self.stop or _due(progress.iteration, run.checkpoint.interval):
                self.save()
            if self.stop and not last:
                break
        self.published()
        if self.stop and progress.iteration < run.train.iterations:
            raise TrainingStopped(
                f"stopped by {self.stop} after iteration {progress.iteration} of {run.train.iterations}; the checkpoint "
                f"{self.checkpoints.path(progress.iteration)} is complete: start again to go on",
                STATUS[self.stop],
            )

    def tell(self, step: Step) -> None:
        record: dict[str, Any] = {"loss": step.loss, "grad_norm": step.grad_norm, "lr": step.lr, **step.update_norms}
        if step.skipped:
            record["skipped"] = True
        self.telemetry.step(self.progress.iteration, record, self.trainer.phases.take())

    def watch(self, step: Step, first: int) -> None:
        """Count skipped steps, and tell them and spikes with the samples they read."""
        progress = self.progress
        where = f"iteration {progress.iteration}, samples {first} to {progress.samples - 1}"
        spike = self.spikes.jump(step.loss)
        if spike is not None:
            mean, spread = spike
            self.telemetry.warn(f"loss spike at {where}: {step.loss:.4f}, the last ones {mean:.4f} +- {spread:.4f}")
            self.telemetry.record(progress.iteration, {"spike": True})
        progress.skipped = progress.skipped + 1 if step.skipped else 0
        if not step.skipped:
            return
        what = f"loss {step.loss}, gradient norm {step.grad_norm}"
        self.telemetry.warn(f"step skipped at {where}: {what}; no weight moved ({progress.skipped} in a row)")
        if progress.skipped >= self.run.train.max_skipped:
            self.published()
            latest = on_rank_zero(self.checkpoints.latest)
            good = (
                f"the last good checkpoint is {self.checkpoints.path(latest)}"
                if latest
                else "there is no checkpoint yet"
            )
            raise TrainingStopped(
                f"{progress.skipped} steps in a row skipped, the last at {where}: {what}; {good}; "
                "lower train.optimizer.lr or look at these samples",
                STATUS_NOT_FINITE,
            )

    def evaluate(self) -> None:
        with self.trainer.phases("evaluation"):
            losses = {name: self.trainer.evaluate(data) for name, data in self.datasets.watched.items()}
        self.telemetry.evaluation(self.progress.iteration, losses)
        self.spent()

    def save(self) -> None:
        """Save, unless what is there is this already."""
        trainer, progress = self.trainer, self.progress
        if self.saved == progress.iteration:
            return
        trainer.mark("checkpoint")
        with trainer.phases("checkpoint"):
            self.published()
            trainer.gather_weights()
            path = self.checkpoints.save(
                trainer.session, progress, self.identity, trainer.optimizer_state, trainer.method
            )
        self.saved = progress.iteration
        if not self.checkpoints.pending:
            self.telemetry.say(f"checkpoint {path}")
        self.spent()

    def published(self) -> None:
        """Finish a checkpoint in the background, if there is one."""
        path = self.checkpoints.finish()
        if path is not None:
            self.telemetry.say(f"checkpoint {path}")

    def spent(self) -> None:
        """Record the time of what was not a step."""
        taken = self.trainer.phases.take()
        self.telemetry.record(self.progress.iteration, {f"seconds_{k}": round(v, 6) for k, v in taken.items()})


def train(
    trainer: Trainer,
    identity: Identity,
    datasets: Datasets,
    telemetry: Telemetry,
    progress: Progress,
    started: float | None = None,
) -> Progress:
    """Train from `progress` to train.iterations; evaluates and saves on the way. Collective.

    `started` (time.monotonic) is when train.exit_after begins to count. Raises TrainingStopped where the run ends before.
    """
    loop = Loop(trainer, identity, datasets, telemetry, progress)
    run = trainer.run
    telemetry.say(backends(trainer.session.chunks, trainer.optimizer, trainer.session.config.attention_backend.name))
    watchdog = Watchdog(0.9 * 60 * run.parallel.timeout_minutes)
    trainer.mark = lambda doing: watchdog.mark(progress.iteration + 1, doing)
    trainer.waits = watchdog.waits
    with StopRequests(seconds(run.train.exit_after), started) as requests, watchdog:
        try:
            loop.work(requests)
        except (RuntimeError, dist.DistError) as error:
            who = lost_loader(error) or watchdog.lost(error)
            if who is None:
                raise
            raise TrainingStopped(f"iteration {progress.iteration + 1}: {who}", STATUS_RANK_LOST) from error
    return loop.progress


def _due(iteration: int, interval: int) -> bool:
    return interval > 0 and iteration % interval == 0
