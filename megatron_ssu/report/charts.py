"""Charts of runs as SVG that is part of a page: text and axes take the page's colour, so that they follow dark mode."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_ssu.report.run_record import RunRecord

COLOURS = ("#1f77b4", "#d95f02", "#2a9d5c", "#c2397f", "#8a63d2", "#b8860b", "#17a2b8", "#7f7f7f")
_INK = "#010203"  # stands for the page's colour until the picture is text
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "megatron-ssu", "font.family": "sans-serif", "text.color": _INK,
    "axes.labelcolor": _INK, "axes.edgecolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "axes.facecolor": "none",
    "figure.facecolor": "none", "legend.frameon": False, "font.size": 10,
}  # fmt: skip


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def curves(runs: Sequence[RunRecord], panels: Sequence[tuple[str, str]]) -> list[str]:
    """A picture per metric (name, title) that some run has, with a line per run."""
    return [_curve(runs, key, title) for key, title in panels if any(run.series(key)[0] for run in runs)]


def _curve(runs: Sequence[RunRecord], key: str, title: str) -> str:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, run in enumerate(runs):
            iterations, values = run.series(key)
            mark = "o" if len(values) < 40 else None
            axes.plot(iterations, values, color=colour(number), lw=1.5, marker=mark, ms=3, label=run.name)
        _finish(axes, title, "iteration")
        if len(runs) > 1:
            axes.legend(fontsize=8)

    return _svg(draw, (4.6, 2.8))


def plane(runs: Sequence[RunRecord], source: str, target: str) -> str | None:
    """The source's loss against the target's: a path per run, its last point large, the front of the last points dashed."""
    paths = [_path(run, source, target) for run in runs]
    if not any(paths):
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        last = [path[-1] for path in paths if path]
        front = sorted(p for p in last if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in last))
        if len(front) > 1:
            axes.plot([x for x, _ in front], [y for _, y in front], color=_INK, lw=1, ls="--", label="Pareto front")
        for number, (run, path) in enumerate(zip(runs, paths, strict=True)):
            if path:
                xs, ys = [x for x, _ in path], [y for _, y in path]
                axes.plot(xs, ys, color=colour(number), lw=1, alpha=0.6)
                axes.scatter(xs[-1:], ys[-1:], color=colour(number), s=60, zorder=3, label=run.name)
        _finish(axes, "target loss", "source loss (less is better: to the left and down)")
        axes.legend(fontsize=8)

    return _svg(draw, (5.6, 4.0))


def _path(run: RunRecord, source: str, target: str) -> list[tuple[float, float]]:
    kept, learnt = (dict(zip(*run.series(key), strict=True)) for key in (source, target))
    return [(kept[i], learnt[i]) for i in sorted(kept.keys() & learnt.keys())]


def _finish(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(below, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=below == "iteration"))
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _svg(draw: Any, size: tuple[float, float]) -> str:
    """An <svg> element that grows with the page."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' height="[^"]*pt"', "", text, count=1)
    return re.sub(r'<svg ([^>]*?)width="[^"]*"', r'<svg \1width="100%"', text, count=1)


def png(figure: Figure) -> str:
    """A picture as the address of an <img>."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
