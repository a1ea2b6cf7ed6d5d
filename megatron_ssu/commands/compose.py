"""Combine shields."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_ssu.shield.shield_file import load_shield


def run(run_file: None, options: argparse.Namespace, console: Console) -> int:
    compose(options.operation, [Path(s) for s in options.shields], Path(options.output), console)
    return 0


def compose(operation: str, files: Sequence[Path], target: Path, console: Console) -> None:
    """Write the union, intersection or difference of shield files; `target` must not be there yet."""
    from megatron_ssu.shield.compose import compose as combine

    shield = combine(operation, [load_shield(file, check=True) for file in files])
    shield.save(target)
    linear = shield.realised()["linear"]
    console.print(
        f"{target}: {operation} of {len(files)} shields, {linear['ratio']:.4f} of {linear['elements']:,} linear weights frozen",
        highlight=False,
        soft_wrap=True,
    )
