"""Logs of a run: console lines or a progress bar, metrics.jsonl, TensorBoard, Weights & Biases. Rank 0 only."""

from __future__ import annotations

import logging
import resource
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_ssu.config.schema import RunConfig
from megatron_ssu.engine.device import has_cuda
from megatron_ssu.errors import UserError
from megatron_ssu.train.sinks import Guarded, open_sinks

log = logging.getLogger(__name__)


class Telemetry:
    """Takes records of numbers by iteration; on other ranks than 0 it does nothing.

    `flops`: model FLOPs of a token; `peak`: FLOP/s of all GPUs together, None where unknown.
    """

    def __init__(
        self,
        run: RunConfig,
        console: Console,
        *,
        active: bool,
        start: int = 0,
        flops: float | None = None,
        peak: float | None = None,
    ) -> None:
        self.run, self.console, self.active = run, console, active
        self.flops, self.peak = flops, peak
        self._sinks: list[Guarded] = []
        self._bar: Progress | None = None
        self._busy, self._steps = 0.0, 0  # seconds and steps since the last line
        if not active:
            return
        self._sinks = open_sinks(run, start, self.warn)
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=run.train.iterations, completed=start)
            self._bar.start()

    def say(self, text: str) -> None:
        """A line for people, also in the rank's log."""
        if self.active:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
            log.info(text)

    def warn(self, text: str) -> None:
        """A line about something that went wrong but does not end the run."""
        if self.active:
            self.say(f"warning: {text}")

    def measures(self, iteration: int) -> bool:
        """Whether the costlier numbers (update norms) of this iteration are wanted."""
        return iteration % self.run.log.interval == 0 or iteration == self.run.train.iterations

    def step(self, iteration: int, record: dict[str, Any], seconds: dict[str, float] | None = None) -> None:
        """After every training step: loss, grad_norm, lr, ...; `seconds` by what they went to."""
        if not self.active:
            return
        seconds = seconds or {}
        taken = sum(seconds.values())
        self._busy, self._steps = self._busy + taken, self._steps + 1
        record = {**record, **{f"seconds_{key.replace('-', '_')}": round(value, 6) for key, value in seconds.items()}}
        if taken > 0:
            record |= self._speed(taken, 1)
        if self._bar is not None:
            self._bar.update(self._task, completed=iteration, description=f"loss {record['loss']:.4f}")
        if not self.measures(iteration):
            self._write(iteration, record)
            return
        record |= _memory()
        self._write(iteration, record)
        busy, steps = max(self._busy, 1e-9), self._steps
        self._busy, self._steps = 0.0, 0
        speed = self._speed(busy, steps)
        left = timedelta(seconds=round((self.run.train.iterations - iteration) * busy / steps))
        mfu = f" | MFU {speed['mfu']:.1%}" if "mfu" in speed else ""
        self.say(
            f"iteration {iteration:>6}/{self.run.train.iterations} | loss {record['loss']:.4f} | "
            f"grad norm {record['grad_norm']:.3f} | lr {record['lr']:.2e} | "
            f"{speed['tokens_per_second']:,.0f} tokens/s{mfu} | ETA {left}"
        )

    def _speed(self, seconds: float, steps: int) -> dict[str, float]:
        tokens = steps * self.run.train.global_batch_size * self.run.data.sequence_length / seconds
        found = {"tokens_per_second": round(tokens, 3)}
        if self.flops:
            found["model_tflops_per_second"] = round(tokens * self.flops / 1e12, 6)
            if self.peak:
                found["mfu"] = round(tokens * self.flops / self.peak, 6)
        return found

    def record(self, iteration: int, record: dict[str, Any]) -> None:
        """Numbers without a console line."""
        if self.active:
            self._write(iteration, record)

    def evaluation(self, iteration: int, losses: dict[str, float]) -> None:
        """After an evaluation: source_valid_loss, target_valid_loss, or source_valid_loss/NAME, ..."""
        if self.active and losses:
            self._write(iteration, losses)
            shown = " | ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in losses.items())
            self.say(f"evaluation {iteration:>5} | {shown}")

    def _write(self, iteration: int, record: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(iteration, record)

    def close(self) -> None:
        """Close every sink; never raises, so that it hides no other error."""
        if self._bar is not None:
            with suppress(Exception):
                self._bar.stop()
        for sink in self._sinks:
            sink.close()
        self._sinks, self._bar = [], None


def _memory() -> dict[str, float]:
    """Peak bytes of this process: on the GPU where there is one, else resident."""
    if has_cuda():
        return {"memory_bytes": float(torch.cuda.max_memory_allocated())}
    scale = 1 if sys.platform == "darwin" else 1024
    return {"memory_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale)}


class _RankLog(logging.FileHandler):
    """Lines that cannot be written are dropped; logging would print a traceback for each."""

    def close(self) -> None:
        logging.getLogger().removeHandler(self)
        super().close()

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def log_to_file(directory: Path, rank: int, *, quiet: bool) -> logging.Handler:
    """Send this rank's log to <directory>/logs/rank_NNNNN.log; with `quiet` nowhere else. Raises UserError."""
    path = directory / "logs" / f"rank_{rank:05d}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _RankLog(path, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; see checkpoint.directory") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    if quiet:
        for other in [h for h in root.handlers if type(h) is logging.StreamHandler]:
            root.removeHandler(other)
    root.addHandler(handler)
    logging.getLogger("megatron_ssu").setLevel(logging.INFO)
    for shown in root.handlers:
        if shown is not handler and shown.level < logging.WARNING:
            shown.setLevel(logging.WARNING)
    return handler
