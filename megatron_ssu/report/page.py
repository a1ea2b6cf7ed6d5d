"""One page about runs: everything in the file, nothing from a network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from megatron_ssu import __version__
from megatron_ssu.errors import UserError
from megatron_ssu.report import charts
from megatron_ssu.report.run_record import RunRecord
from megatron_ssu.scoring.scores_file import Scores
from megatron_ssu.shield.inspect import inspect_shield
from megatron_ssu.shield.plots import heatmap, score_figure
from megatron_ssu.shield.verify import VerifyReport

_COSTS = (("tokens_per_second", "tokens per second"), ("memory_bytes", "peak memory, bytes"))


@dataclass(frozen=True)
class Table:
    """Evaluation: a row per data and metric, a cell per model."""

    models: list[str]
    rows: list[tuple[str, str, list[tuple[str, str]]]]  # data, metric, (value, forgetting) per model


def render(runs: Sequence[RunRecord], tables: Sequence[Table], verified: dict[str, VerifyReport], command: str) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader("megatron_ssu.report", "."),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
    )
    losses = _losses(runs)
    return environment.get_template("page.html").render(
        title=", ".join(run.name for run in runs),
        version=__version__,
        command=command,
        runs=[_summary(run, number, verified.get(run.name)) for number, run in enumerate(runs)],
        curves=charts.curves(runs, losses),
        plane=charts.plane(runs, "source_valid_loss", "target_valid_loss"),
        asked=charts.curves(runs, [(key, key.removeprefix("evaluate/")) for key in _asked(runs)]),
        costs=charts.curves(runs, _COSTS),
        tables=tables,
    )


def read_results(path: str | Path) -> Table:
    """What `evaluate --output` wrote. Raises UserError where it is something else."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        models = list(dict.fromkeys(line["model"] for line in lines))
        cells = {(line["data"], line["metric"], line["model"]): line for line in lines}
        rows = [
            (data, metric, [_cell(cells.get((data, metric, model))) for model in models])
            for data, metric in dict.fromkeys((line["data"], line["metric"]) for line in lines)
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not what `megatron-ssu evaluate --output` writes ({type(error).__name__})") from error
    if not lines:
        raise UserError(f"{path}: empty; evaluate again")
    return Table(models, rows)


def _cell(line: dict[str, Any] | None) -> tuple[str, str]:
    if line is None or line["value"] is None:
        return "-", ""
    lost = line["forgetting"]
    if lost is None:
        return f"{line['value']:.4f}", ""
    within = "" if lost["low"] is None else f" ({lost['low']:+.1f} to {lost['high']:+.1f})"
    return f"{line['value']:.4f}", f"{lost['percent']:+.1f} %{within}"


def _losses(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Metrics of the curves, with their titles: source and target side by side, then what training sees."""
    found = sorted({name for run in runs for name in run.names("source_valid_loss", "target_valid_loss")})
    return [(name, name.replace("_valid_loss", " loss").replace("/", ": ")) for name in found] + [
        ("loss", "training loss")
    ]


def _asked(runs: Sequence[RunRecord]) -> list[str]:
    found = sorted({name for run in runs for name in run.names("evaluate/")})
    return [name for name in found if "/language/" not in name and not name.endswith("loss_per_token")]


def _summary(run: RunRecord, number: int, verified: VerifyReport | None) -> dict[str, Any]:
    """What the page says of one run."""
    method = run.get("method", "name", default="ssu")
    changes = [_change(run, name) for name in run.names("source_valid_loss", "target_valid_loss")]
    facts = [
        ("model", run.get("model", "path", default="?")),
        ("method", method),
        ("what trains", _frozen(run)),
        ("iterations", f"{run.iteration:,} of {run.iterations:,}"),
        ("batch", _batch(run)),
        ("learning rate", f"{run.get('train', 'optimizer', 'lr', default='?')}"),
        ("precision", run.get("precision", "dtype", default="?")),
        ("duration", str(run.duration) if run.duration else "?"),
    ]
    return {
        "name": run.name,
        "path": str(run.path),
        "colour": charts.colour(number),
        "facts": [(key, str(value)) for key, value in facts],
        "said": run.facts,
        "changes": [change for change in changes if change],
        "data": [(name, f"{count:,}") for name, count in run.tokens.items()],
        "pictures": _pictures(run),
        "events": run.events + _marked(run),
        "skipped": sum(bool(record.get("skipped")) for record in run.records.values()),
        "spikes": sum(bool(record.get("spike")) for record in run.records.values()),
        "resumed": sum("resuming after" in words for _, words in run.events),
        "shield": run.shield.digest() if run.shield else None,
        "verified": verified and {"line": verified.verdict, "ok": verified.ok, "shield": verified.shield},
        "text": run.text,
        "commands": _commands(run),
    }


def _frozen(run: RunRecord) -> str:
    if run.shield is None:
        return "no shield"
    linear = run.shield.realised()["linear"]
    return f"{linear['ratio']:.2%} of {linear['elements']:,} linear weights frozen, by {run.shield.granularity}"


def _batch(run: RunRecord) -> str:
    size, length = (run.get(*keys, default=0) for keys in (("train", "global_batch_size"), ("data", "sequence_length")))
    return f"{size} sequences of {length} tokens"


def _change(run: RunRecord, name: str) -> dict[str, str] | None:
    _, values = run.series(name)
    if not values:
        return None
    percent = 100 * (values[-1] / values[0] - 1) if values[0] else 0.0
    title = name.replace("_valid_loss", " loss").replace("/", ": ")
    return {"name": title, "first": f"{values[0]:.4f}", "last": f"{values[-1]:.4f}", "percent": f"{percent:+.1f} %"}


def _marked(run: RunRecord) -> list[tuple[str, str]]:
    skipped = [i for i, record in sorted(run.records.items()) if record.get("skipped")]
    return [("", f"steps skipped: {', '.join(map(str, skipped[:20]))}")] if skipped else []


def _pictures(run: RunRecord) -> list[tuple[str, str]]:
    """Addresses and descriptions: scores where their file is there, fractions of layers and kinds where they differ."""
    if run.shield is None:
        return []
    scores = run.path / "scores.safetensors"
    seen = inspect_shield(run.shield, Scores.load(scores) if scores.is_file() else None, None)
    found = []
    if any(view.scores is not None for view in seen.views):
        found.append((charts.png(score_figure(seen)), "Scores of every matrix, frozen and trainable"))
    ratios = {round(view.ratio, 2) for view in seen.views if view.matrix.scored}
    if len(ratios) > 1:
        found.append(
            (charts.png(heatmap(seen, lambda v: v.ratio, "frozen fraction", "fraction")), "Frozen fraction by layer")
        )
    return found


def _commands(run: RunRecord) -> list[str]:
    found = [f"megatron-ssu train {run.path / 'run.yaml'}"]
    export, model = run.get("checkpoint", "export"), run.get("model", "path", default="MODEL")
    if export:
        if run.shield is not None:
            shield = run.path / "shield.safetensors"
            found.append(f"megatron-ssu verify --source {model} --adapted {export} --shield {shield}")
        found.append(
            f"megatron-ssu evaluate source={model} {run.name}={export} --texts FILE --chats FILE --output results.jsonl"
        )
    return found
