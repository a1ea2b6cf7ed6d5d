"""Tables of how far models drifted, for people. Imports no engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from megatron_ssu.drift.weights import Moves, WeightDrift


def weights_table(drift: WeightDrift, names: Sequence[str]) -> list[Table]:
    """A table per model: all weights, kinds, layers; and one of pairs, where there are several models."""
    tables = []
    for name, model in zip(names[1:], drift.models, strict=True):
        table = _table(f"{name} against {names[0]}", "weights", "difference", "relative", "moved", "largest change")
        _row(table, "all", model.total)
        table.add_section()
        for kind, moves in model.by(0).items():
            _row(table, kind, moves)
        table.add_section()
        for layer, moves in sorted(model.by(1).items(), key=lambda item: -1 if item[0] is None else item[0]):
            if layer is not None:
                _row(table, f"layer {layer}", moves)
        tables.append(table)
    if drift.pairs:
        table = _table("models with each other", "pair", "difference", "of first update", "of second update", "cosine")
        for (i, j), pair in drift.pairs.items():
            found = pair.to_dict(drift.models[i].total, drift.models[j].total)
            table.add_row(f"{names[i + 1]}, {names[j + 1]}", *(f"{value:.4g}" for value in found.values()))
        tables.append(table)
    return tables


def hidden_table(drift: dict[str, Any], base: str, name: str) -> Table:
    """Measures by layer, and of the predictions; `drift` as HiddenDrift.to_dict gives it."""
    table = _table(
        f"{name} against {base}, on {drift['tokens']:,} predicted tokens",
        "layer",
        "cosine",
        "CKA",
        "covariance",
        "mean",
    )
    for layer, found in drift["layers"].items():
        table.add_row(layer, *(f"{found[key]:.4f}" for key in ("cosine", "cka", "covariance", "mean")))
    table.add_section()
    table.add_row("KL", f"{drift['kl']:.4f}", "loss", *(f"{loss:.4f}" for loss in drift["loss"]))
    return table


def show(tables: Sequence[Table], console: Console) -> None:
    """Print them; what does not fit a pipe's assumed 80 columns gets what it needs there."""
    out = console if console.is_terminal else Console(file=console.file, quiet=console.quiet, width=160)
    for table in tables:
        out.print(table)


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def _row(table: Table, name: str, moves: Moves) -> None:
    found = moves.to_dict()
    table.add_row(
        name,
        f"{found['difference']:.4g}",
        f"{found['relative']:.3%}",
        f"{found['moved']:.2%}",
        f"{found['largest']:.3g}",
    )
