"""The study's results as JSON, Markdown tables and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
from rich.console import Console
from rich.markdown import Markdown

from megatron_ssu.io.atomic import write_text

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Measure = Callable[[Mapping[str, Any]], float]
ABILITIES: dict[str, Measure] = {
    "English ability": lambda found: found["EA"],
    "multilingual ability": lambda found: found["MA"],
    "overall": lambda found: found["mean"],
}
DRIFT: dict[str, Measure] = {
    "KL": lambda found: found["drift"]["hidden"]["kl"],
    "cosine": lambda found: mean(layer["cosine"] for layer in _layers(found)),
    "CKA": lambda found: mean(layer["cka"] for layer in _layers(found)),
    "covariance": lambda found: mean(layer["covariance"] for layer in _layers(found)),
    "relative change": lambda found: found["drift"]["weights"]["relative"],
    "moved": lambda found: found["drift"]["weights"]["moved"],
}


def write_report(output: Path, results: Mapping[str, Any], console: Console) -> None:
    """results.json, two-phases.md and two-phases.png in `output`."""
    write_text(output / "results.json", json.dumps(results, indent=1) + "\n")
    text = (
        "\n\n".join((_similar(results), *(_methods(english, seeds) for english, seeds in results["models"].items())))
        + "\n"
    )
    write_text(output / "two-phases.md", text)
    _draw(results["models"], output / "two-phases.png")
    console.print(Markdown(text))
    console.print(f"{output / 'two-phases.md'}, two-phases.png and results.json written")


def _layers(found: Mapping[str, Any]) -> list[dict[str, float]]:
    return list(found["drift"]["hidden"]["layers"].values())


def _spread(values: list[float]) -> str:
    """Mean and standard deviation, the latter of two values and more."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def _similar(results: Mapping[str, Any]) -> str:
    """How alike the instructions of either first phase and the second are, and how far apart the base is after each alone."""
    head = ["phase 1", "DES", "MPD", "of phase 2's update", "of phase 1's update", "cosine of updates"]
    rows = []
    for english, pairs in results["apart"].items():
        keys = ("difference", "relative_to_first_update", "relative_to_second_update", "cosine_of_updates")
        values = [_spread([pair[key] for pair in pairs]) for key in keys]
        des = results["similarity"][english]
        rows.append([english, f"{des['value']:.3f} ± {des['spread']:.3f}", *values])
    return _table(head, rows)


def _methods(english: str, seeds: list[Mapping[str, Any]]) -> str:
    """Abilities and drift after phase 2 by method."""
    columns = {**ABILITIES, **DRIFT}
    rows = []
    for method in seeds[0]:
        values = [
            _spread([measure(seed[method]) for seed in seeds])
            if name in ABILITIES or "drift" in seeds[0][method]
            else ""
            for name, measure in columns.items()
        ]
        rows.append([method, *values])
    return f"**{english} first phase**\n\n" + _table(["phase 2", *columns], rows)


def _draw(models: Mapping[str, list[Mapping[str, Any]]], path: Path) -> None:
    """A panel per first phase: every method's abilities, their means and standard deviations."""
    figure, panels = plt.subplots(1, len(models), figsize=(6 * len(models), 5), sharex=True, sharey=True, squeeze=False)
    for panel, (english, seeds) in zip(panels[0], models.items(), strict=True):
        for number, method in enumerate(name for name in seeds[0] if name != "after phase 1"):
            pairs = [[seed[method][key] for seed in seeds] for key in ("EA", "MA")]
            panel.errorbar(
                *(mean(values) for values in pairs),
                **{
                    f"{axis}err": stdev(values) if len(values) > 1 else 0
                    for axis, values in zip("xy", pairs, strict=True)
                },
                fmt="osD^v<>ph*"[number % 10],
                color=f"C{number % 10}",
                markersize=8,
                capsize=2,
                label=method,
            )
        panel.axvline(mean(seed["after phase 1"]["EA"] for seed in seeds), color="grey", linestyle=":")
        panel.set(
            title=f"{english} first phase",
            xlabel="English ability (dotted: after phase 1)",
            xlim=(-0.03, 1.05),
            ylim=(-0.03, 1.05),
        )
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("multilingual ability")
    panels[0][-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
