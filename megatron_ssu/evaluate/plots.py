"""Pictures of an evaluation, as PNG: the plane of the source's ability against the target's, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_ssu.errors import UserError
from megatron_ssu.evaluate.front import Point, front
from megatron_ssu.io.atomic import written_aside


def plane_figure(points: Sequence[Point], chosen: Point) -> Figure:
    """Points by both figures, the front as a line, the chosen one ringed; better is to the right and up."""
    first = points[0]
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    best = sorted(front(points), key=lambda p: p.source.value)
    axes.plot(
        [p.source.value for p in best], [p.target.value for p in best], color="tab:blue", lw=1, label="Pareto front"
    )
    axes.scatter([p.source.value for p in points], [p.target.value for p in points], color="tab:blue", zorder=3)
    axes.scatter(
        [chosen.source.value],
        [chosen.target.value],
        s=160,
        facecolors="none",
        edgecolors="tab:red",
        zorder=4,
        label="chosen",
    )
    for point in points:
        place = (point.source.value, point.target.value)
        axes.annotate(point.name, place, xytext=(6, 4), textcoords="offset points", fontsize=8)
    for axis, measured in ((axes.xaxis, first.source), (axes.yaxis, first.target)):
        axis.set_inverted(measured.better == "lower")
        axis.set_label_text(f"{measured.data}: {measured.metric} ({measured.better} is better)")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Raises UserError where it cannot be written."""
    try:
        with written_aside(path) as part:
            FigureCanvasAgg(figure).print_png(str(part))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
