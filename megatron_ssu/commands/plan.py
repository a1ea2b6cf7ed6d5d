"""Plan a shield from scores. Starts within a second; then loads the tokenizer, with transformers and torch, unless
shield.special_tokens is false."""

from __future__ import annotations

import argparse
import os

from rich.console import Console

from megatron_ssu.commands.given import has_begun, refuse_given
from megatron_ssu.config.checks.checkpoint import validate_checkpoint
from megatron_ssu.config.schema import RunConfig
from megatron_ssu.errors import UserError
from megatron_ssu.methods.planned import scores_path, shield_path, write_plan
from megatron_ssu.methods.registry import method_of
from megatron_ssu.models.source import open_source
from megatron_ssu.scoring.scores_file import Scores
from megatron_ssu.shield.shield_file import Shield
from megatron_ssu.train.run_lock import RunLock


def run(run_file: RunConfig, options: argparse.Namespace, console: Console) -> int:
    plan(run_file, console)
    return 0


def plan(run: RunConfig, console: Console) -> Shield:
    """Write the shield file of a run file from its scores file. Needs no weights but for some choices, and one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("plan: runs as one process; start it without torchrun")
    refuse_given("plan", "shield.file", run.shield.file)
    method = method_of(run)
    if not method.planned:
        raise UserError(f"method.name: {method.name} has no shield that `plan` makes; choose another, or run `train`")
    validate_checkpoint(run)
    if run.model.hf_path is not None:
        _take_source(run)
    source = open_source(run.model.path)
    method.validate(run, list(source.family.matrices(source.dims)))
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


def _take_source(run: RunConfig) -> None:
    from megatron_ssu.commands.start import take_source

    take_source(run, method_of(run), training=False)
