"""What a run's directory says of it: run file, metrics, log, shield. Reads no weight and no checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from megatron_ssu.errors import UserError
from megatron_ssu.shield.shield_file import Shield, load_shield

_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ (\w+) (.*)")
_TOLD = ("resuming after", "warning:", "stopped by", "best so far", "evaluate.stop_when")
_READ = "tokens_read/"


@dataclass
class RunRecord:
    """One run, as far as it has got."""

    name: str
    path: Path
    text: str  # its run file
    config: Mapping[str, Any]
    records: dict[int, dict[str, Any]]  # by iteration, from metrics.jsonl; of several lines the last
    events: list[tuple[str, str]]  # time and words
    facts: list[str]  # how it describes itself: mesh, method, libraries
    shield: Shield | None
    begun: datetime | None = None
    ended: datetime | None = None

    def get(self, *keys: str, default: Any = None) -> Any:
        """A value of the run file."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return default if value is None else value

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Iterations and values of a metric, those that are numbers."""
        pairs = [(i, r[key]) for i, r in sorted(self.records.items()) if isinstance(r.get(key), int | float)]
        return [i for i, _ in pairs], [float(v) for _, v in pairs]

    def names(self, *beginnings: str) -> list[str]:
        """Metrics whose names begin so, sorted."""
        return sorted({key for record in self.records.values() for key in record if key.startswith(beginnings)})

    @property
    def iteration(self) -> int:
        """Of the last step."""
        return max((i for i, record in self.records.items() if "loss" in record), default=0)

    @property
    def iterations(self) -> int:
        return int(self.get("train", "iterations", default=0))

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens that were read of each source of the training data, by its name."""
        found: dict[str, int] = {}
        for _, record in sorted(self.records.items()):
            found |= {key.removeprefix(_READ): int(v) for key, v in record.items() if key.startswith(_READ)}
        return found

    @property
    def duration(self) -> timedelta | None:
        """From the first line of its log to the last, pauses included."""
        return self.ended - self.begun if self.begun and self.ended else None


@dataclass
class _Log:
    events: list[tuple[str, str]] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    times: list[datetime] = field(default_factory=list)


def read_run_record(directory: str | Path) -> RunRecord:
    """Raises UserError where the directory is not that of a run, or a file in it cannot be read."""
    path = Path(directory)
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        path = path.parent
    file = path / "run.yaml"
    if not file.is_file():
        raise UserError(f"{directory}: has no run.yaml; name the directory of a run (checkpoint.directory)")
    try:
        text = file.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read ({type(error).__name__})") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: must be a run file, got something else")
    log = _read_log(path / "logs" / "rank_00000.log")
    shield = path / "shield.safetensors"
    return RunRecord(
        name=path.resolve().name,
        path=path,
        text=text,
        config=config,
        records=_read_metrics(path / "metrics.jsonl"),
        events=log.events,
        facts=log.facts,
        shield=load_shield(shield) if shield.is_file() else None,
        begun=min(log.times, default=None),
        ended=max(log.times, default=None),
    )


def _read_metrics(file: Path) -> dict[int, dict[str, Any]]:
    if not file.is_file():
        raise UserError(f"{file}: missing; the run has not begun to train")
    found: dict[int, dict[str, Any]] = {}
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            found.setdefault(int(record["iteration"]), {}).update(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged ({type(error).__name__}: {error})") from error
    return found


def _read_log(file: Path) -> _Log:
    """Events and facts; nothing where the log is gone."""
    log = _Log()
    if not file.is_file():
        return log
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        time, level, words = match.groups()
        log.times.append(datetime.fromisoformat(time))
        if level != "INFO" or words.startswith(_TOLD):
            log.events.append((time, words))
        elif " on " in words and "(tensor)" in words:
            log.facts = [words]
        elif words.startswith("linear layers:"):
            log.facts.append(words)
    return log
