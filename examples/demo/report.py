"""The demo's table and plot, from what evaluate.py and the two adaptations wrote.

python report.py --results results.json --run FFT=RUN_DIR --run SSU=RUN_DIR --plot forgetting.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

from megatron_ssu.io.atomic import written_aside

COLOURS = {"before": "#8a8f98", "FFT": "#d1495b", "SSU": "#00798c"}
LOSSES = {"source_valid_loss": "Source loss while adapting", "target_valid_loss": "Target loss while adapting"}


def results_table(results: dict[str, dict[str, Any]]) -> Table:
    """One row per model: losses, chat accuracy in all and for each task."""
    tasks = list(next(iter(results.values()))["chat_tasks"])
    table = Table(title="The source model before and after it was adapted to the target language")
    table.add_column("model", style="bold")
    for heading in ("source loss", "target loss", "chat exact match", *tasks):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        shares = [f"{result['chat_tasks'][task]:.0%}" for task in tasks]
        table.add_row(
            name, f"{result['source_loss']:.3f}", f"{result['target_loss']:.3f}", f"{result['chat']:.1%}", *shares
        )
    return table


def read_curve(metrics: Path, key: str) -> tuple[list[int], list[float]]:
    """Iterations and values of `key` in a metrics.jsonl; lines without it (no evaluation then) are passed over."""
    points = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get(key) is not None:
            points[row["iteration"]] = row[key]  # a resumed run logs an iteration twice: the later one counts
    return sorted(points), [points[iteration] for iteration in sorted(points)]


def draw_plot(results: dict[str, dict[str, Any]], runs: dict[str, Path], path: Path) -> None:
    """Both losses over the adaptations and the chat accuracy after them, as a PNG at `path`."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for axis, (key, title) in zip(axes, LOSSES.items()):
        for name, run in runs.items():
            axis.plot(*read_curve(run / "metrics.jsonl", key), marker="o", ms=3.5, label=name, color=COLOURS.get(name))
        axis.set(title=title, xlabel="iteration", ylabel="loss (nats per token)")
        axis.legend(frameon=False)
    _chat_bars(axes[2], results)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
    with written_aside(path) as part:
        figure.savefig(part, dpi=130, format="png")
    plt.close(figure)


def _chat_bars(axis: Axes, results: dict[str, dict[str, Any]]) -> None:
    shares = [100 * result["chat"] for result in results.values()]
    bars = axis.bar(list(results), shares, color=[COLOURS.get(name) for name in results], width=0.6)
    axis.bar_label(bars, fmt="%.0f %%", padding=2)
    axis.set(title="Chat tasks answered exactly", ylabel="%", ylim=(0, 108))


def named_path(text: str) -> tuple[str, Path]:
    """NAME=PATH as a pair."""
    name, separator, path = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text}: write NAME=PATH")
    return name, Path(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the demo's table and draw its plot.")
    parser.add_argument("--results", type=Path, required=True, help="JSON file of evaluate.py")
    parser.add_argument("--run", type=named_path, action="append", required=True, metavar="NAME=RUN_DIR")
    parser.add_argument("--plot", type=Path, required=True, help="PNG to write")
    args = parser.parse_args()
    results = json.loads(args.results.read_text(encoding="utf-8"))
    draw_plot(results, dict(args.run), args.plot)
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(results_table(results))


if __name__ == "__main__":
    main()
