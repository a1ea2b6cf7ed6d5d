"""Look at a shield."""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from megatron_ssu.io.atomic import check_folder, check_writable, write_text
from megatron_ssu.io.extras import require
from megatron_ssu.scoring.scores_file import Scores
from megatron_ssu.shield.shield_file import load_shield


def run(run_file: None, options: argparse.Namespace, console: Console) -> int:
    inspect(options, console)
    return 0


def inspect(options: argparse.Namespace, console: Console) -> None:
    """Print a shield file as a table; with options.output draw it, with options.json write the table as JSON."""
    from megatron_ssu.shield.inspect import inspect_shield

    if options.output:
        require("--output", "matplotlib", "plots")
    target = check_writable(options.json) if options.json else None
    pictures = check_folder(options.output) if options.output else None
    shield = load_shield(options.shield, check=True)
    scores = Scores.load(options.scores) if options.scores else None
    other = load_shield(options.compare, check=True) if options.compare else None
    found = inspect_shield(shield, scores, other, score=options.score)
    if target is not None:
        write_text(target, json.dumps(found.to_dict(), indent=1) + "\n")
    paths = []
    if pictures is not None:
        from megatron_ssu.shield.plots import draw_all  # matplotlib is slow to import and a table does not need it

        paths = draw_all(found, pictures)
    # A table that does not fit a pipe's assumed 80 columns would be cut, so it gets what it needs there.
    found.render(console if console.is_terminal else Console(file=console.file, quiet=console.quiet, width=160))
    for path in paths:
        console.print(f"{path}: drawn", highlight=False, soft_wrap=True)
