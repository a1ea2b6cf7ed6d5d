"""Dial an adaptation back: models between the source and the adapted one, evaluated, and the best of them exported."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from megatron_ssu.commands.evaluate import Named, evaluated, join_ranks, section_of, versions_of
from megatron_ssu.engine.ranks import is_rank_zero, on_rank_zero
from megatron_ssu.errors import UserError
from megatron_ssu.evaluate.dial import GROUPS, write_point
from megatron_ssu.evaluate.front import Point, choose, forgetting, front
from megatron_ssu.evaluate.measured import Measured
from megatron_ssu.evaluate.questions import Questions, read_questions
from megatron_ssu.evaluate.results import ModelResult, described, to_jsonl
from megatron_ssu.io.atomic import check_folder, check_target, write_text
from megatron_ssu.io.extras import require
from megatron_ssu.models.hf_files import HFCheckpoint
from megatron_ssu.models.source import Source, open_source
from megatron_ssu.shield.verify import check_tensors


@dataclass(frozen=True)
class _Place:
    """A point before it is evaluated."""

    name: str
    alphas: Mapping[str, float]

    @property
    def end(self) -> str | None:
        """Which of the two models it is, if any."""
        values = set(self.alphas.values())
        return {frozenset({0.0}): "source", frozenset({1.0}): "adapted"}.get(frozenset(values))


def run(run_file: None, options: argparse.Namespace, console: Console) -> int:
    if options.steps < 2:
        raise UserError(f"--steps: must be at least 2, got {options.steps}")
    require("--output", "matplotlib", "plots")
    source = open_source(options.source, "--source")
    adapted = HFCheckpoint(options.adapted)
    check_tensors(source.checkpoint, adapted)
    folder = check_folder(options.output)
    export = check_target(options.export, "--export") if options.export else None
    figures = [_figure(options, side) for side in ("source", "target")]
    planned = places(options.steps, options.per_kind)
    if options.choose is not None and options.choose not in [place.name for place in planned]:
        names = ", ".join(place.name for place in planned)
        raise UserError(f"--choose: must be one of {names}, got {options.choose!r}")
    questions = read_questions(section_of(options))
    join_ranks(options)
    points, results = _evaluated(planned, options, questions, (source, adapted), folder, figures, console)

    def finish() -> None:
        chosen = choose(points, options.keep)
        if options.choose is not None:
            chosen = next(point for point in points if point.name == options.choose)
        _report(points, chosen, results, folder, versions_of(questions), console)
        if export is not None:
            write_point(source, adapted, chosen.alphas, export)
            console.print(f"{options.export}: {chosen.name} exported", highlight=False, soft_wrap=True)

    on_rank_zero(finish)
    return 0


def places(steps: int, per_kind: bool) -> list[_Place]:
    """The points: alpha from 0 to 1 of all weights; per kind of one kind from 0 up, the others at 1. The source comes first."""
    alphas = [number / (steps - 1) for number in range(steps)]
    if not per_kind:
        return [_Place(f"{alpha:g}", dict.fromkeys(GROUPS, alpha)) for alpha in alphas]
    found = [_Place("0", dict.fromkeys(GROUPS, 0.0))]
    for group in GROUPS:
        found += [_Place(f"{group} {alpha:g}", dict.fromkeys(GROUPS, 1.0) | {group: alpha}) for alpha in alphas[:-1]]
    return [*found, _Place("1", dict.fromkeys(GROUPS, 1.0))]


def _evaluated(
    planned: Sequence[_Place],
    options: argparse.Namespace,
    questions: Questions,
    ends: tuple[Source, HFCheckpoint],
    folder: Path,
    figures: Sequence[tuple[str, str, str]],
    console: Console,
) -> tuple[list[Point], list[ModelResult]]:
    """Every point on rank 0, evaluated in a folder that is removed again. Collective."""
    points: list[Point] = []
    results: list[ModelResult] = []
    path = folder / ".point"
    for place in planned:
        console.print(f"evaluating {place.name}", highlight=False, soft_wrap=True)
        model = {"source": options.source, "adapted": options.adapted, None: str(path)}[place.end]
        if place.end is None:
            on_rank_zero(lambda place=place: _write(*ends, place, path))  # type: ignore[misc]
        try:
            result = evaluated(Named(place.name, model), options, questions, lambda chats, lines: None)
        finally:
            if is_rank_zero():
                shutil.rmtree(path, ignore_errors=True)
        results.append(result)
        on_rank_zero(lambda place=place, result=result: points.append(_point(place, result, figures)))  # type: ignore[misc]
    return points, results


def _point(place: _Place, result: ModelResult, figures: Sequence[tuple[str, str, str]]) -> Point:
    source, target = (_found(result, data, metric, key) for key, data, metric in figures)
    return Point(place.name, place.alphas, source, target, tuple(result.measured))


def _write(source: Source, adapted: HFCheckpoint, place: _Place, path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    write_point(source, adapted, place.alphas, path, "--output")


def _figure(options: argparse.Namespace, side: str) -> tuple[str, str, str]:
    """The option, and the data and metric that it names."""
    key, text = f"--{side}-figure", getattr(options, f"{side}_figure")
    data, separator, metric = text.partition(":")
    if not separator:
        raise UserError(f"{key}: must be DATA:METRIC, such as {side}:loss_per_byte, got {text!r}")
    return key, data, metric


def _found(result: ModelResult, data: str, metric: str, key: str) -> Measured:
    found = result.get(data, metric)
    if found is None or found.better is None:
        known = ", ".join(f"{m.data}:{m.metric}" for m in result.measured if m.better is not None)
        raise UserError(f"{key}: {data}:{metric} is not measured; there are {known}")
    return found


def _report(
    points: Sequence[Point],
    chosen: Point,
    results: Sequence[ModelResult],
    folder: Path,
    versions: dict[str, str],
    console: Console,
) -> None:
    from megatron_ssu.evaluate.plots import plane_figure, save

    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "results.jsonl", to_jsonl(results, versions))
    best, lines = front(points), []
    table = Table(header_style="bold", box=SIMPLE, pad_edge=False)
    table.add_column("alpha")
    for side in (points[0].source, points[0].target):
        table.add_column(f"{side.data}: {side.metric}", justify="right")
    for heading in ("forgetting (95 % interval)", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for point in points:
        lost = forgetting(points, point)
        marks = [word for word, yes in (("front", point in best), ("chosen", point is chosen)) if yes]
        cells = (f"{point.source.value:.4f}", f"{point.target.value:.4f}", described(lost), ", ".join(marks))
        table.add_row(point.name, *cells)
        values = {"alphas": dict(point.alphas), "source": point.source.value, "target": point.target.value}
        lines.append(json.dumps({"point": point.name, **values, "forgetting": lost.percent, "marks": marks}))
    write_text(folder / "points.jsonl", "\n".join(lines) + "\n")
    save(plane_figure(points, chosen), folder / "front.png")
    console.print(table)
    for name in ("front.png", "points.jsonl", "results.jsonl"):
        console.print(f"{folder / name}: written", highlight=False, soft_wrap=True)
