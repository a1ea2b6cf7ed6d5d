"""What a run tells: console lines, metrics.jsonl, TensorBoard. Rank 0 alone writes."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_ssu.config.schema import RunConfig


class Telemetry:
    """Takes records of numbers by iteration; on other ranks than 0 it does nothing."""

    def __init__(self, run: RunConfig, console: Console, *, active: bool, start: int = 0) -> None:
        self.run, self.console, self.active = run, console, active
        self._writer = self._file = None
        self._since, self._done = time.perf_counter(), start
        if not active:
            return
        directory = Path(run.checkpoint.directory)
        self._file = (directory / "metrics.jsonl").open("a", encoding="utf-8")
        if run.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1 if start else None)

    def say(self, text: str) -> None:
        """A line for people."""
        if self.active:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, iteration: int, record: dict[str, float]) -> None:
        """After every training step: loss, grad_norm, lr."""
        if not self.active:
            return
        self._write(iteration, record)
        if iteration % self.run.log.interval == 0 or iteration == self.run.train.iterations:
            now = time.perf_counter()
            steps, seconds = iteration - self._done, now - self._since
            self._since, self._done = now, iteration
            speed = steps * self.run.train.global_batch_size * self.run.data.sequence_length / seconds
            left = timedelta(seconds=round((self.run.train.iterations - iteration) * seconds / max(1, steps)))
            self.say(
                f"iteration {iteration:>6}/{self.run.train.iterations} | loss {record['loss']:.4f} | "
                f"grad norm {record['grad_norm']:.3f} | lr {record['lr']:.2e} | {speed:,.0f} tokens/s | ETA {left}"
            )
            self._write(iteration, {"tokens_per_second": speed}, plain=False)

    def evaluation(self, iteration: int, losses: dict[str, float]) -> None:
        """After an evaluation: source_valid_loss, target_valid_loss."""
        if self.active and losses:
            self._write(iteration, losses)
            told = " | ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in losses.items())
            self.say(f"evaluation {iteration:>5} | {told}")

    def pause(self) -> Pause:
        """Context in which time does not count as training."""
        return Pause(self)

    def _write(self, iteration: int, record: dict[str, Any], *, plain: bool = True) -> None:
        if plain and self._file is not None:
            self._file.write(json.dumps({"iteration": iteration, **record}) + "\n")
            self._file.flush()
        if self._writer is not None:
            for key, value in record.items():
                self._writer.add_scalar(key, value, iteration)

    def close(self) -> None:
        for sink in (self._file, self._writer):
            if sink is not None:
                sink.close()


class Pause:
    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._telemetry._since += time.perf_counter() - self._start
