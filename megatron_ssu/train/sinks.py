"""Where a run's numbers go: metrics.jsonl, TensorBoard, Weights & Biases.

A sink may fail when it opens, writes or closes: the disk is full, the network is down, its library breaks. Training is
worth more than its records: `Guarded` warns once, drops that sink, and lets no error of it through.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from megatron_ssu.config.schema import RunConfig
from megatron_ssu.errors import UserError, one_line
from megatron_ssu.io.atomic import written_aside
from megatron_ssu.io.extras import installed, require

Record = dict[str, Any]


class Sink(Protocol):
    """Takes records of numbers by iteration; each method may raise any exception."""

    def write(self, iteration: int, record: Record) -> None: ...

    def close(self) -> None: ...


class Guarded:
    """A sink that opens, writes and closes without an error, whatever happens; `warn` gets one line when it is lost."""

    def __init__(self, name: str, open_sink: Callable[[], Sink], warn: Callable[[str], None]) -> None:
        self._name, self._warn = name, warn
        self._sink: Sink | None = None
        try:
            self._sink = open_sink()
        except Exception as error:
            self._lost("cannot be opened", error)

    def write(self, iteration: int, record: Record) -> None:
        if self._sink is None:
            return
        try:
            self._sink.write(iteration, record)
        except Exception as error:
            sink, self._sink = self._sink, None
            self._lost(f"cannot be written at iteration {iteration}", error)
            with suppress(Exception):  # of the record that could not be written
                sink.close()

    def close(self) -> None:
        """Never raises."""
        sink, self._sink = self._sink, None
        if sink is None:
            return
        try:
            sink.close()
        except Exception as error:
            self._lost("cannot be closed, its last records may be missing", error)

    def _lost(self, what: str, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or one_line(error)
        with suppress(Exception):  # whatever `warn` does
            self._warn(f"{self._name} {what}: {reason}; training continues without it until the next start")


class MetricsFile:
    """metrics.jsonl: one strict JSON object per line, null where a number is NaN or infinite."""

    def __init__(self, path: Path, start: int) -> None:
        """Keeps the records up to iteration `start`: later steps are done again."""
        if path.exists():
            _keep_records(path, start)
        self._file = path.open("a", encoding="utf-8")

    def write(self, iteration: int, record: Record) -> None:
        plain = {key: None if _not_finite(value) else value for key, value in record.items()}
        self._file.write(json.dumps({"iteration": iteration, **plain}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files in `directory`."""

    def __init__(self, directory: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if not isinstance(threading.excepthook, _ThreadErrors):
            threading.excepthook = _ThreadErrors(threading.excepthook)
        self._writer: Any = SummaryWriter(str(directory), purge_step=start + 1 if start else None)

    def write(self, iteration: int, record: Record) -> None:
        for key, value in _numbers(record).items():
            self._writer.add_scalar(key, value, iteration)

    def close(self) -> None:
        self._writer.close()


class _ThreadErrors:
    """`threading.excepthook` without the tracebacks of TensorBoard's threads: the next write raises what ended one."""

    def __init__(self, before: Callable[[Any], Any]) -> None:
        self._before = before

    def __call__(self, error: Any) -> None:
        if not type(error.thread).__module__.startswith("tensorboard."):
            self._before(error)


class WeightsAndBiases:
    """A run of the project log.wandb_project, resumed by later starts in the same directory."""

    def __init__(self, run: RunConfig) -> None:
        import wandb

        place = Path(run.checkpoint.directory).resolve()
        self._run: Any = wandb.init(
            project=run.log.wandb_project,
            name=place.name,
            id=f"{place.name}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}",  # others may have the same name
            resume="allow",
            dir=run.checkpoint.directory,
            config=asdict(run),
        )

    def write(self, iteration: int, record: Record) -> None:
        self._run.log(_numbers(record), step=iteration)

    def close(self) -> None:
        self._run.finish()


def open_sinks(run: RunConfig, start: int, warn: Callable[[str], None]) -> list[Guarded]:
    """The sinks that a run file asks for, after iteration `start`."""
    directory = Path(run.checkpoint.directory)
    sinks = [Guarded("metrics.jsonl", lambda: MetricsFile(directory / "metrics.jsonl", start), warn)]
    if run.log.tensorboard and not installed("tensorboard"):
        warn(
            "log.tensorboard: tensorboard is not installed, and metrics.jsonl alone has the numbers; "
            'pip install "megatron-ssu[tensorboard]", or set log.tensorboard: false'
        )
    elif run.log.tensorboard:
        sinks.append(Guarded("TensorBoard", lambda: TensorBoard(directory / "tensorboard", start), warn))
    if run.log.wandb_project:
        sinks.append(Guarded("Weights & Biases", lambda: WeightsAndBiases(run), warn))
    return sinks


def evaluations(path: Path) -> list[Record]:
    """The evaluations in a metrics.jsonl, by iteration: `iteration` and the losses of the validation sets."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        record = json.loads(line)
        losses = {key: value for key, value in record.items() if "_valid_loss" in key}
        if losses:
            found.append({"iteration": record["iteration"], **losses})
    return found


def check_wandb(run: RunConfig) -> None:
    """Raises UserError where the run asks for Weights & Biases and it cannot start: not installed, or not logged in."""
    if not run.log.wandb_project:
        return
    require("log.wandb_project", "wandb", "wandb")
    import wandb

    try:
        wandb.login()  # asks a terminal for the key where there is none; offline it asks for nothing
    except wandb.errors.Error as error:
        raise UserError(
            f"log.wandb_project: Weights & Biases is not logged in ({one_line(error)}); run `wandb login`, or set "
            "WANDB_MODE=offline"
        ) from error


def _keep_records(path: Path, start: int) -> None:
    """Drop the records after iteration `start`, and a line that a killed process left unfinished."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, TypeError, KeyError):
            if start and json.loads(line)["iteration"] <= start:
                kept.append(line + "\n")
    with written_aside(path) as part:
        part.write_text("".join(kept), encoding="utf-8")


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _numbers(record: Record) -> Record:
    """What can be drawn over iterations."""
    return {key: value for key, value in record.items() if isinstance(value, int | float) and math.isfinite(value)}
