"""Commands that run a model on a mesh, or prepare and estimate such a run."""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
from rich.console import Console

from megatron_ssu.commands.shields import has_begun, refuse_given
from megatron_ssu.config.load import save_run
from megatron_ssu.config.schema import RunConfig
from megatron_ssu.config.units import parse_size, parse_split
from megatron_ssu.config.validate_train import validate_checkpoint, validate_data
from megatron_ssu.data.datasets import build_train_valid, build_valid
from megatron_ssu.data.indexed import content_digest
from megatron_ssu.data.run_datasets import Prefixes, prepare_run, present_train, run_tokenizer
from megatron_ssu.data.tokenizer import Tokenizer
from megatron_ssu.engine.device import device_name
from megatron_ssu.engine.mesh import start_processes
from megatron_ssu.engine.ranks import is_rank_zero, on_all_ranks, on_rank_zero
from megatron_ssu.errors import UserError
from megatron_ssu.estimate.flops import flops_per_token, peak_flops
from megatron_ssu.io.atomic import check_writable, write_text
from megatron_ssu.methods.base import method_named
from megatron_ssu.methods.planned import scores_path, shield_path
from megatron_ssu.methods.scored import check_replaceable, make_scores
from megatron_ssu.models.hf_config import read_hf_config
from megatron_ssu.models.hf_export import check_target, export_model
from megatron_ssu.models.parallel_model import ParallelModel, check_run, open_model
from megatron_ssu.models.source import Source
from megatron_ssu.shield.shield_file import Shield, load_shield
from megatron_ssu.train.checkpoints import Checkpoints, Progress
from megatron_ssu.train.identity import identity_of
from megatron_ssu.train.loop import Datasets, train
from megatron_ssu.train.resume_check import check_exported, checkpoint_record, may_be_exported, newest
from megatron_ssu.train.run_lock import held
from megatron_ssu.train.sinks import check_wandb
from megatron_ssu.train.telemetry import Telemetry, log_to_file
from megatron_ssu.train.trainer import Trainer

log = logging.getLogger(__name__)


def score(run: RunConfig, console: Console) -> None:
    """Write the scores file of a run file."""
    source = _start(run, training=False)
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


def prepare(run: RunConfig, console: Console, *, skip_bad_lines: bool) -> None:
    """Tokenize what the run file names and is not tokenized yet."""
    validate_data(run)
    validate_checkpoint(run)
    tokenizer = run_tokenizer(run)
    with held(run.checkpoint.directory, "prepare"):
        prefixes, reports = prepare_run(run, tokenizer, console, skip_bad_lines=skip_bad_lines)
    for report in reports:
        console.print(
            f"{report.prefix}: {report.documents:,} documents, {report.tokens:,} tokens"
            + (f", {report.skipped} bad lines skipped" if report.skipped else ""),
            highlight=False,
            soft_wrap=True,
        )
    if not reports:
        console.print(f"nothing to do: all of {len(prefixes.train)} training datasets are prepared", highlight=False)


def train_run(run: RunConfig, console: Console) -> Progress:
    """Make what is missing (datasets, scores, shield), train, and export where the run file asks for it."""
    source = _start(run, training=True)
    with held(run.checkpoint.directory, "train"):
        return _train(run, source, console)


def _train(run: RunConfig, source: Source, console: Console) -> Progress:
    checkpoints, method = Checkpoints(run.checkpoint.directory), method_named(run.shield.method)
    latest = on_rank_zero(lambda: newest(run, checkpoints))
    exported = on_rank_zero(lambda: may_be_exported(run, latest))
    on_rank_zero(lambda: _begin_directory(run))
    on_all_ranks(lambda: _log(run))
    tokenizer = on_all_ranks(lambda: run_tokenizer(run))
    if exported:
        digests_of = partial(_digests_or_saved, run, tokenizer)
        shield_of = partial(method.present_shield, run, source)
        on_rank_zero(lambda: check_exported(run, source, checkpoints, shield_of, digests_of))
        console.print(f"{run.checkpoint.export}: the run has ended and is exported; nothing to do", highlight=False)
        return Progress(run.train.iterations, run.train.iterations * run.train.global_batch_size)
    on_rank_zero(lambda: method.check(run, source, begun=latest is not None))
    prefixes = on_rank_zero(lambda: prepare_run(run, tokenizer, console)[0])
    session = open_model(run, source)
    datasets = on_all_ranks(lambda: _datasets(run, session, prefixes, tokenizer))
    shield = method.shield(session, begun=latest is not None)
    identity = identity_of(run, shield, datasets.train_digests)
    trainer = Trainer(session, shield)
    progress = Progress(phase=run.train.phase.number)
    if latest is not None:
        progress = checkpoints.load(latest, session, identity, trainer.optimizer_state)
        trainer.resume(progress)
    on_rank_zero(lambda: save_run(run, Path(run.checkpoint.directory) / "run.yaml"))
    telemetry = _telemetry(session, console, progress)
    try:
        _announce(telemetry, session, shield, progress)
        progress = train(trainer, shield, datasets, telemetry, progress, _process_start())
    finally:
        telemetry.close()
    if run.checkpoint.export:
        _export(session, Path(run.checkpoint.export), identity.facts, progress, console)
    return progress


def export(run: RunConfig, output: str | Path, iteration: int | None, console: Console) -> None:
    """Write a checkpoint of the run as a Hugging Face directory, from whatever mesh the run file names now."""
    source = _start(run, training=False, shielding=False)
    target = on_rank_zero(lambda: check_target(output, "--output"))
    checkpoints = Checkpoints(run.checkpoint.directory)
    found = on_rank_zero(lambda: iteration if iteration is not None else _newest(checkpoints))
    session = open_model(run, source, load=False)
    common = checkpoints.load_weights(found, session)
    _export(session, target, common["identity"], Progress(**common["progress"]), console)


def _newest(checkpoints: Checkpoints) -> int:
    found = checkpoints.latest()
    if found is None:
        raise UserError(f"{checkpoints.folder}: no checkpoint to export; train first, or name the run's directory")
    return found


def estimate(run: RunConfig, options: argparse.Namespace, console: Console) -> None:
    """Print memory, work and time of a run on options.world_size ranks; with options.json write them as JSON."""
    from megatron_ssu.estimate.estimate import estimate as count
    from megatron_ssu.estimate.estimate import smallest_world
    from megatron_ssu.estimate.hardware import gpu_named
    from megatron_ssu.estimate.report import render, to_dict

    gpu = gpu_named(options.gpu) if options.gpu else None
    target = check_writable(options.json) if options.json else None
    if not 0 < options.efficiency <= 1:
        raise UserError(f"--efficiency: {options.efficiency} must be above 0 and at most 1; 0.6 is usual")
    world = smallest_world(run) if options.world_size is None else options.world_size
    if world < 1:
        raise UserError(f"--world-size: {world} must be 1 or more")
    hf = read_hf_config(run.model.path)
    path = shield_path(run)
    shield = load_shield(path) if run.shield.method != "none" and path.exists() else None
    found = count(run, hf, world, shield=shield, engine=not options.local_layers)
    render(found, gpu, console, options.efficiency)
    if target is not None:
        write_text(target, json.dumps(to_dict(found, gpu, options.efficiency), indent=1) + "\n")


def _start(run: RunConfig, *, training: bool, shielding: bool = True) -> Source:
    """Join the ranks and check the run file; all ranks get through, or none."""
    method_named(run.shield.method)
    start_processes(run.parallel.timeout_minutes)
    return on_all_ranks(lambda: check_run(run, training=training, shielding=shielding))


def _begin_directory(run: RunConfig) -> None:
    check_wandb(run)
    directory = Path(run.checkpoint.directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / "run.yaml").exists():  # else once the checkpoint is compared with it
            save_run(run, directory / "run.yaml")
    except OSError as error:
        raise UserError(f"checkpoint.directory: {directory} cannot be written: {error.strerror}") from error
    Checkpoints(directory).clean()


def _datasets(run: RunConfig, session: ParallelModel, prefixes: Prefixes, tokenizer) -> Datasets:
    _warn_of_unused_documents(run)
    samples = run.train.iterations * run.train.global_batch_size
    valid_samples = 0
    if not prefixes.target_valid:
        valid_samples = run.train.eval_batches * run.train.global_batch_size
    common = {"sequence_length": run.data.sequence_length, "vocab_size": session.source.dims.vocab}
    trained, from_split = build_train_valid(
        prefixes.train,
        tokenizer,
        split=run.data.used_split,
        seed=run.data.seed,
        train_samples=samples,
        valid_samples=valid_samples,
        cache_dir=Path(run.checkpoint.directory) / "data" / "index",
        **common,  # type: ignore[arg-type]
    )
    watched: dict[str, Any] = {
        name: build_valid(path, tokenizer, **common)  # type: ignore[arg-type]
        for kind, paths in (("source_valid_loss", prefixes.source_valid), ("target_valid_loss", prefixes.target_valid))
        for name, path in _names(kind, paths)
    }
    if from_split is not None:
        watched["target_valid_loss"] = from_split
    return Datasets(trained, watched, _train_digests(prefixes))


def _train_digests(prefixes: Prefixes) -> list[str]:
    return [content_digest(prefix) for prefix, _ in prefixes.train]


def _digests_or_saved(run: RunConfig, tokenizer: Tokenizer, saved: Sequence[str]) -> list[str]:
    """Digests of the training datasets, the `saved` one for each that is gone: nothing is tokenized only to compare it.

    Where the dataset of the saved digest is still there, the run file names another one.
    """
    there = {
        content_digest(index.with_suffix(""))[:16] for index in Path(run.checkpoint.directory, "data").glob("*.idx")
    }
    present, digests = present_train(run, tokenizer), []
    for number, prefix in enumerate(present):
        was = saved[number] if number < len(saved) else "none"
        gone = "not prepared" if was in there else was
        digests.append(content_digest(prefix) if prefix is not None else gone)
    return digests


def _warn_of_unused_documents(run: RunConfig) -> None:
    """A split given beside target_valid keeps documents from training that nothing else reads."""
    unused = 1 - parse_split(run.data.used_split)[0]
    if run.data.target_valid and unused > 0 and is_rank_zero():
        log.warning(
            "data.split: %s keeps %.3g %% of the documents out of training, and data.target_valid is watched instead of "
            "them; leave data.split out to train on all",
            run.data.used_split,
            100 * unused,
        )


def _names(kind: str, paths: dict[str, Path]) -> list[tuple[str, Path]]:
    """Metric names of validation sets: the kind alone for a single path, else kind/name."""
    return [(f"{kind}/{name}" if name else kind, path) for name, path in paths.items()]


def _telemetry(session: ParallelModel, console: Console, progress: Progress) -> Telemetry:
    run, source = session.run, session.source
    peak = run.log.peak_tflops * 1e12 if run.log.peak_tflops else peak_flops(device_name())
    active = session.mesh.rank == 0

    def open_telemetry() -> Telemetry:
        return Telemetry(
            run,
            console,
            active=active,
            start=progress.iteration,
            flops=flops_per_token(source.family, source.dims, run.data.sequence_length),
            peak=peak * session.mesh.world if peak else None,
        )

    return on_all_ranks(open_telemetry)


def _log(run: RunConfig) -> None:
    rank = dist.get_rank()
    log_to_file(Path(run.checkpoint.directory), rank, quiet=rank > 0)


def _process_start() -> float:
    """When this process began, on the clock of time.monotonic."""
    return time.monotonic() - (time.time() - psutil.Process().create_time())


def _announce(telemetry: Telemetry, session: ParallelModel, shield: Shield, progress: Progress) -> None:
    linear = shield.realised()["linear"]
    frozen = f"{linear['ratio']:.2%} of its linear weights frozen" if shield.masks else "nothing frozen"
    telemetry.say(f"{session.source.name} on {session.mesh}, {session.run.precision.dtype}: {frozen} ({shield.method})")
    if progress.iteration:
        telemetry.say(f"going on after iteration {progress.iteration}")


def _export(session: ParallelModel, target: Path, facts: dict[str, Any], progress: Progress, console: Console) -> None:
    """Export the session's weights, which are those of the checkpoint with this identity and progress."""
    run = session.run
    size = parse_size(run.checkpoint.max_shard_size)
    name = Path(run.checkpoint.directory).resolve().name
    checkpoint = Checkpoints(run.checkpoint.directory).path(progress.iteration)
    record = on_rank_zero(lambda: checkpoint_record(session.source, checkpoint, facts, progress).to_json(name))
    export_model(session.layout, session.mesh, session.source.checkpoint, target, size, record=record)
    if session.mesh.rank == 0:
        console.print(f"{target}: exported", highlight=False, soft_wrap=True)
