"""Results of several models side by side: JSON lines, and a table with forgetting against the first."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from megatron_ssu.evaluate.measured import Change, Measured, change, interval


@dataclass(frozen=True)
class ModelResult:
    """What was measured of one model."""

    name: str
    path: str
    fingerprint: str
    backend: str  # what ran it: transformers and its version, or a mesh
    measured: list[Measured]

    def get(self, data: str, metric: str) -> Measured | None:
        return next((m for m in self.measured if (m.data, m.metric) == (data, metric)), None)


def to_jsonl(results: Sequence[ModelResult], versions: dict[str, str]) -> str:
    """A line per model and figure; forgetting is against the first model."""
    lines = []
    for number, result in enumerate(results):
        for m in result.measured:
            lost = _change(results, number, m)
            within = interval(m)
            line: dict[str, Any] = {
                "model": result.name,
                "data": m.data,
                "metric": m.metric,
                "value": m.value if math.isfinite(m.value) else None,
                "low": within and within[0],
                "high": within and within[1],
                "items": m.items,
                "better": m.better,
                "forgetting": lost and {"percent": lost.percent, "low": lost.low, "high": lost.high},
                "source": results[0].name if number else None,
                "path": result.path,
                "fingerprint": result.fingerprint,
                "backend": result.backend,
                "facts": m.facts,
                "versions": versions,
            }
            lines.append(json.dumps(line, ensure_ascii=False))
    return "\n".join(lines) + "\n"


def show(results: Sequence[ModelResult], console: Console) -> None:
    """Print a row per figure and a column per model; of all but the first also forgetting."""
    table = Table(header_style="bold", box=SIMPLE, pad_edge=False)
    table.add_column("data", overflow="fold")
    table.add_column("metric", overflow="fold")
    for number, result in enumerate(results):
        table.add_column(result.name, justify="right")
        if number:
            table.add_column("forgetting (95 % interval)", justify="right")
    last = None
    for data, metric in dict.fromkeys((m.data, m.metric) for result in results for m in result.measured):
        if last not in (None, data):
            table.add_section()
        cells = []
        for number, result in enumerate(results):
            m = result.get(data, metric)
            cells.append("-" if m is None else f"{m.value:.4f}")
            if number:
                cells.append("" if m is None else described(_change(results, number, m)))
        table.add_row("" if data == last else data, metric, *cells)
        last = data
    console.print(table)


def described(lost: Change | None) -> str:
    """Forgetting in words; a minus is a gain."""
    if lost is None:
        return ""
    within = "" if lost.low is None or lost.high is None else f" ({lost.low:+.1f} to {lost.high:+.1f})"
    return f"{lost.percent:+.1f} %{within}"


def _change(results: Sequence[ModelResult], number: int, m: Measured) -> Change | None:
    source = results[0].get(m.data, m.metric) if number else None
    return change(source, m) if source is not None else None
