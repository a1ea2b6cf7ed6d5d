"""Write a checkpoint as a Hugging Face directory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_ssu.commands.start import start
from megatron_ssu.config.schema import RunConfig
from megatron_ssu.config.units import parse_size
from megatron_ssu.engine.ranks import on_rank_zero
from megatron_ssu.errors import UserError
from megatron_ssu.io.atomic import check_target
from megatron_ssu.methods.base import Method
from megatron_ssu.methods.registry import method_of
from megatron_ssu.models.hf_export import export_model
from megatron_ssu.models.parallel_model import ParallelModel, open_model
from megatron_ssu.models.source import Source
from megatron_ssu.train.checkpoints import Checkpoints, Progress
from megatron_ssu.train.resume_check import checkpoint_record


def run(run_file: RunConfig, options: argparse.Namespace, console: Console) -> int:
    export(run_file, options.output, options.iteration, console)
    return 0


def export(run: RunConfig, output: str | Path, iteration: int | None, console: Console) -> None:
    """Write a checkpoint of the run as a Hugging Face directory, from whatever mesh the run file names now."""
    method = method_of(run)
    source = start(run, method, training=False, writing=False)
    target = on_rank_zero(lambda: check_target(output, "--output"))
    session, common = _opened(run, source, method, iteration)
    export_run(session, method, target, common["identity"], Progress(**common["progress"]), console)


def load_exported(run: RunConfig, iteration: int | None) -> tuple[ParallelModel, int]:
    """The model with the weights that an export of a checkpoint (None: the newest) has, and its iteration. Collective."""
    method = method_of(run)
    source = start(run, method, training=False, writing=False)
    session, common = _opened(run, source, method, iteration)
    method.before_export(session)
    return session, common["progress"]["iteration"]


def _opened(
    run: RunConfig, source: Source, method: Method, iteration: int | None
) -> tuple[ParallelModel, dict[str, Any]]:
    """The model with a checkpoint's weights, and the checkpoint's common part. Collective."""
    checkpoints = Checkpoints(run.checkpoint.directory)
    found = on_rank_zero(lambda: iteration if iteration is not None else _newest(checkpoints))
    session = open_model(run, source, load=False)
    return session, checkpoints.load_weights(found, session, method)


def _newest(checkpoints: Checkpoints) -> int:
    found = checkpoints.latest()
    if found is None:
        raise UserError(f"{checkpoints.folder}: no checkpoint to export; train first, or name the run's directory")
    return found


def export_run(
    session: ParallelModel, method: Method, target: Path, facts: dict[str, Any], progress: Progress, console: Console
) -> None:
    """Export the model's weights, which are those of the checkpoint with this identity and progress."""
    run = session.run
    size = parse_size(run.checkpoint.max_shard_size)
    name = Path(run.checkpoint.directory).resolve().name
    checkpoint = Checkpoints(run.checkpoint.directory).path(progress.iteration)
    record = on_rank_zero(lambda: checkpoint_record(session.source, checkpoint, facts, progress).to_json(name))
    method.before_export(session)
    export_model(
        session.layout,
        session.mesh,
        session.source.checkpoint,
        target,
        size,
        record=record,
        further=lambda folder: method.export_files(session, folder),
    )
    if session.mesh.rank == 0:
        console.print(f"{target}: exported", highlight=False, soft_wrap=True)
