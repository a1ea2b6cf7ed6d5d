"""Pictures of how far models drifted, as PNG: relative change by layer and kind, and measures of hidden states by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_ssu.drift.weights import ModelMoves, WeightDrift
from megatron_ssu.errors import UserError
from megatron_ssu.io.atomic import written_aside
from megatron_ssu.models.matrix import KINDS

_PANELS = (
    ("cosine", "cosine"),
    ("cka", "linear CKA"),
    ("covariance", "covariance shift"),
    ("mean", "shift of the mean"),
)


def draw(drift: WeightDrift, hidden: Sequence[dict[str, Any]], names: Sequence[str], directory: Path) -> list[Path]:
    """Write weights.png and, with `hidden`, hidden.png; returns their paths. Raises UserError where they cannot be written."""
    paths = [directory / "weights.png"]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _save(weights_figure(drift, names), paths[0])
        if hidden:
            paths.append(directory / "hidden.png")
            _save(hidden_figure(hidden, names), paths[1])
    except OSError as error:
        raise UserError(f"{directory}: pictures cannot be written ({error.strerror or error})") from error
    return paths


def weights_figure(drift: WeightDrift, names: Sequence[str]) -> Figure:
    """Layers (down) by kinds (across) of ||change|| / ||weights||, a panel per model; one colour scale."""
    kinds = [kind for kind in KINDS if any((kind, 0) in model.parts for model in drift.models)]
    grids = [_grid(model, kinds) for model in drift.models]
    layers, highest = grids[0].shape[0], max(float(np.nanmax(grid)) for grid in grids)
    row = 0.34 if layers <= 12 else 0.24 if layers <= 48 else 0.17
    width = 2.0 + 0.78 * len(kinds)
    figure = Figure(figsize=(width * len(grids) + 0.8, 1.9 + row * layers), layout="constrained")
    axes = figure.subplots(1, len(grids), squeeze=False)[0]
    for place, grid, name in zip(axes, grids, names[1:], strict=True):
        image = place.imshow(grid, cmap="viridis", vmin=0, vmax=highest or 1, aspect="auto", interpolation="nearest")
        place.set_xticks(range(len(kinds)), [kind.removesuffix("_proj") for kind in kinds])
        place.yaxis.set_major_locator(MaxNLocator(integer=True))
        place.set_title(name, fontsize=10)
        place.set_ylabel("layer")
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1, decimals=1 if highest < 0.1 else 0))
    bar.set_label("change relative to the weights")
    figure.suptitle(f"Weights against {names[0]}", fontsize=11)
    return figure


def hidden_figure(hidden: Sequence[dict[str, Any]], names: Sequence[str]) -> Figure:
    """The four measures by layer, a line per model."""
    figure = Figure(figsize=(9.0, 6.4), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for found, name in zip(hidden, names[1:], strict=True):
            layers = sorted(int(layer) for layer in found["layers"])
            axes.plot(layers, [found["layers"][str(n)][key] for n in layers], marker="o", markersize=3, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(f"Hidden states against {names[0]}", fontsize=11)
    return figure


def _grid(model: ModelMoves, kinds: Sequence[str]) -> np.ndarray:
    """[layers, kinds], NaN where a layer has no such weight."""
    layers = 1 + max(layer for _, layer in model.parts if layer is not None)
    grid = np.full((layers, len(kinds)), np.nan)
    for (kind, layer), moves in model.parts.items():
        if layer is not None and kind in kinds:
            grid[layer, kinds.index(kind)] = moves.to_dict()["relative"]
    return grid


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with written_aside(path) as part:
        figure.savefig(part, format="png", dpi=150)
