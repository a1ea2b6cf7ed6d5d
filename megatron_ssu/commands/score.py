"""Score a model."""

from __future__ import annotations

import argparse

from rich.console import Console

from megatron_ssu.commands.given import has_begun, refuse_given
from megatron_ssu.commands.start import start
from megatron_ssu.config.schema import RunConfig
from megatron_ssu.engine.ranks import on_rank_zero
from megatron_ssu.errors import UserError
from megatron_ssu.methods.planned import scores_path
from megatron_ssu.methods.registry import method_of
from megatron_ssu.methods.scored import check_replaceable, make_scores
from megatron_ssu.models.parallel_model import open_model
from megatron_ssu.models.source import Source
from megatron_ssu.train.run_lock import held


def run(run_file: RunConfig, options: argparse.Namespace, console: Console) -> int:
    score(run_file, console)
    return 0


def score(run: RunConfig, console: Console) -> None:
    """Write the scores file of a run file."""
    source = start(run, method_of(run), training=False)
    on_rank_zero(lambda: refuse_given("score", "shield.scores", run.shield.scores))
    with held(run.checkpoint.directory, "score"):
        on_rank_zero(lambda: _check_scores_place(run, source))
        scores = make_scores(open_model(run, source))
    if scores is not None:
        console.print(
            f"{scores_path(run)}: {', '.join(scores.scores)} of {scores.model} over {scores.tokens:,} tokens "
            f"({scores.samples} samples)",
            highlight=False,
            soft_wrap=True,
        )


def _check_scores_place(run: RunConfig, source: Source) -> None:
    """Raises UserError where the scores of a run that has begun, or of another model, would be replaced."""
    path = scores_path(run)
    if path.exists() and has_begun(run):
        raise UserError(f"{path}: the run has begun with these scores; choose another checkpoint.directory")
    check_replaceable(run, source)
