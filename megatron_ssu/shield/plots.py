"""Pictures of a shield, as PNG: frozen fraction, score distributions with the cut, overlap; sized by the layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from megatron_ssu.errors import UserError
from megatron_ssu.io.atomic import written_aside
from megatron_ssu.shield.inspect import Inspection, MatrixView
from megatron_ssu.shield.shield_file import Shield

_FROZEN, _TRAINABLE = "#d95f02", "#1f78b4"


def draw_all(inspection: Inspection, directory: Path) -> list[Path]:
    """Write frozen_share.png, with scores also scores.png, with another shield overlap.png; returns their paths.

    The directory is made when missing; pictures of these names in it are replaced. Raises UserError where they cannot be
    written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot be made ({error.strerror or error})") from error
    paths = [directory / "frozen_share.png"]
    shield = inspection.shield
    title = f"{shield.model}: frozen fraction ({shield.realised()['linear']['ratio']:.1%} of the linear weights)"
    _save(heatmap(inspection, lambda v: v.ratio, title, "frozen fraction"), paths[0])
    if any(v.scores is not None for v in inspection.views):
        paths.append(directory / "scores.png")
        _save(score_figure(inspection), paths[-1])
    if inspection.other is not None:
        other = inspection.other
        title = f"{shield.model}: overlap of {_label(shield)}\nand {_label(other)}"
        paths.append(directory / "overlap.png")
        figure = heatmap(
            inspection, lambda v: None if v.overlap is None else v.overlap.jaccard, title, "Jaccard: both / either"
        )
        _save(figure, paths[-1])
    return paths


def heatmap(inspection: Inspection, value: Callable[[MatrixView], float | None], title: str, legend: str) -> Figure:
    """Layers (down) by kinds (across) of a value in [0, 1]; kinds outside the layers are left out."""
    views = [v for v in inspection.views if v.matrix.layer is not None]
    kinds = [kind for kind in inspection.kinds() if any(v.matrix.kind == kind for v in views)]
    if not views:
        raise UserError("inspect: the shield names no matrix of a layer, so there is nothing to draw")
    layers = 1 + max(v.matrix.layer for v in views if v.matrix.layer is not None)
    cells: dict[tuple[int, int], list[float]] = {}
    for view in views:
        number = value(view)
        if number is not None and view.matrix.layer is not None:
            cells.setdefault((view.matrix.layer, kinds.index(view.matrix.kind)), []).append(number)
    grid = np.full((layers, len(kinds)), np.nan)
    for position, numbers in cells.items():  # a layer has several norms
        grid[position] = np.mean(numbers)
    row = 0.34 if layers <= 12 else 0.24 if layers <= 48 else 0.17
    figure = Figure(figsize=(2.6 + 0.85 * len(kinds), 1.9 + row * layers), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(kinds)), kinds, rotation=35, ha="right", rotation_mode="anchor")
    step = 1 if layers <= 20 else 2 if layers <= 48 else 4
    axes.set_yticks(range(0, layers, step))
    axes.set_ylabel("layer")
    axes.set_xticks(np.arange(len(kinds) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(layers + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    for (y, x), number in np.ndenumerate(grid):
        if not np.isnan(number):
            color = "black" if number > 0.6 else "white"
            axes.text(
                x, y, f"{number:.2f}", ha="center", va="center", fontsize=7.5 if layers <= 48 else 6.5, color=color
            )
    axes.set_title(title, fontsize=10, loc="left", wrap=True)
    figure.colorbar(image, ax=axes, label=legend, shrink=min(1.0, 6 / (row * layers + 1)), aspect=25)
    return figure


def score_figure(inspection: Inspection) -> Figure:
    """A panel per kind, a strip per layer: how many columns (or rows) have which score, frozen ones apart; the cut."""
    views = [v for v in inspection.lines() if v.scores is not None and v.matrix.layer is not None]
    kinds = [kind for kind in inspection.kinds() if any(v.matrix.kind == kind for v in views)]
    layers = 1 + max(v.matrix.layer for v in views if v.matrix.layer is not None)
    across = min(4, len(kinds))
    down = -(-len(kinds) // across)
    height = min(9.0, max(2.4, 1.2 + 0.13 * layers))
    figure = Figure(figsize=(3.1 * across + 0.8, height * down + 0.9), layout="constrained")
    for number, kind in enumerate(kinds):
        axes = figure.add_subplot(down, across, number + 1)
        _strips(axes, [v for v in views if v.matrix.kind == kind], layers)
        axes.set_title(kind, fontsize=10)
        if number % across == 0:
            axes.set_ylabel("layer")
        if number + across >= len(kinds):
            axes.set_xlabel("score (log scale)")
    handles = [
        Line2D([], [], color=_FROZEN, linewidth=6, label="frozen"),
        Line2D([], [], color=_TRAINABLE, linewidth=6, label="trainable"),
        Line2D([], [], color="black", linewidth=1.5, label="cut: last frozen score"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.suptitle(
        f"{inspection.shield.model}, {_label(inspection.shield)}: {inspection.score} scores by layer", fontsize=11
    )
    return figure


def _strips(axes: Axes, views: list[MatrixView], layers: int) -> None:
    """One panel of `score_figure`."""
    seen = [(v.matrix.layer, v.scores) for v in views if v.scores is not None and v.matrix.layer is not None]
    present = [scores.values[scores.values > 0] for _, scores in seen if (scores.values > 0).any()]
    low = min((float(values.min()) for values in present), default=0.1)
    high = max((float(values.max()) for values in present), default=1.0)
    low, high = (low / 1.5, high * 1.5) if high / low < 1.2 else (low / 1.05, high * 1.05)
    low = max(low, high * 1e-12)  # a few vanishing scores must not squeeze the rest
    bins = int(np.clip(np.median([scores.values.size for _, scores in seen]) / 10, 16, 60))
    edges = np.geomspace(low, high, bins + 1)
    picture = np.ones((layers, bins, 3))
    for layer, scores in seen:
        values = np.maximum(scores.values, low)
        kept, _ = np.histogram(values[scores.frozen], bins=edges)
        moved, _ = np.histogram(values[~scores.frozen], bins=edges)
        full = max(1, int((kept + moved).max()))
        for counts, color in ((kept, _FROZEN), (moved, _TRAINABLE)):
            picture[layer] -= (counts / full)[:, None] * (1 - np.array(to_rgb(color)))
    axes.pcolormesh(edges, np.arange(layers + 1) - 0.5, picture.clip(0, 1), rasterized=True)
    for layer, scores in seen:
        if scores.last_frozen is not None and scores.last_frozen > 0:
            ends = [layer - 0.5, layer + 0.5]
            axes.plot([scores.last_frozen] * 2, ends, color="black", linewidth=1.2, solid_capstyle="butt")
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(layers - 0.5, -0.5)
    _ticks(axes, low, high)


def _ticks(axes: Axes, low: float, high: float) -> None:
    """Few and plain labels: powers of ten, over short ranges also 2 and 5."""
    decades = np.log10(high / low)
    subs = (1.0, 2.0, 5.0) if decades < 2 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=7))
    if decades < 2:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.tick_params(labelsize=8)


def _label(shield: Shield) -> str:
    ratio = "" if shield.ratio is None else f" {shield.ratio:g}"
    return f"{shield.method} ({shield.score}, by {shield.granularity}, {shield.budget}{ratio})"


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    try:
        with written_aside(path) as part:
            figure.savefig(part, dpi=120, format="png", metadata={"Software": None})
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from error
