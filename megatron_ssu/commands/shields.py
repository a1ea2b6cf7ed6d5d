"""Commands on shield files: plan, inspect, compose, verify. They start within a second; `plan` then loads the tokenizer, with
transformers and torch, unless shield.special_tokens is false."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_ssu.config.schema import RunConfig
from megatron_ssu.config.validate_train import validate_checkpoint
from megatron_ssu.errors import UserError
from megatron_ssu.io.atomic import check_folder, check_writable, write_text
from megatron_ssu.methods.options import check_names, check_rules
from megatron_ssu.methods.planned import scores_path, shield_path, write_plan
from megatron_ssu.models.source import open_source
from megatron_ssu.scoring.scores_file import Scores
from megatron_ssu.shield.shield_file import Shield, load_shield
from megatron_ssu.train.latest import checkpoints_folder, latest_iteration
from megatron_ssu.train.run_lock import RunLock


def plan(run: RunConfig, console: Console) -> Shield:
    """Write the shield file of a run file from its scores file. Needs no weights but for some choices, and one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("plan: runs as one process; start it without torchrun")
    refuse_given("plan", "shield.file", run.shield.file)
    if run.shield.method != "ssu":
        raise UserError(f"shield.method: {run.shield.method} has no shield to plan; write ssu, or leave the key out")
    validate_checkpoint(run)
    source = open_source(run.model.path)
    check_names(run)
    check_rules(run, source.family.matrices(source.dims))
    path = scores_path(run)
    if not path.exists():
        raise UserError(f"{path}: no scores there; run `megatron-ssu score` first, or name a file with shield.scores")
    with RunLock(run.checkpoint.directory, "plan"):
        shield = write_plan(run, source, Scores.load(path), replace=True, begun=has_begun(run))
    linear = shield.realised()["linear"]
    console.print(
        f"{shield_path(run)}: {linear['ratio']:.4f} of {linear['elements']:,} weights frozen by {shield.granularity}, "
        f"score {shield.score}",
        highlight=False,
        soft_wrap=True,
    )
    return shield


def inspect(options: argparse.Namespace, console: Console) -> None:
    """Print a shield file as a table; with options.output draw it, with options.json write the table as JSON."""
    from megatron_ssu.shield.inspect import draw, inspect_shield

    target = check_writable(options.json) if options.json else None
    pictures = check_folder(options.output) if options.output else None
    shield = load_shield(options.shield, check=True)
    scores = Scores.load(options.scores) if options.scores else None
    other = load_shield(options.compare, check=True) if options.compare else None
    found = inspect_shield(shield, scores, other, score=options.score)
    if target is not None:
        write_text(target, json.dumps(found.to_dict(), indent=1) + "\n")
    paths = draw(found, pictures) if pictures is not None else []
    # A table that does not fit a pipe's assumed 80 columns would be cut, so it gets what it needs there.
    found.render(console if console.is_terminal else Console(file=console.file, quiet=console.quiet, width=160))
    for path in paths:
        console.print(f"{path}: drawn", highlight=False, soft_wrap=True)


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


def refuse_given(command: str, key: str, given: str | None) -> None:
    """Raises UserError for a file of the user's that the command would replace."""
    if given is not None:
        raise UserError(f"{key}: {given} was made before and `{command}` does not replace it; leave the key out")


def has_begun(run: RunConfig) -> bool:
    """Has the run checkpoints, whose shield must stay?"""
    return latest_iteration(checkpoints_folder(run.checkpoint.directory)) is not None
