"""Train: the whole job, from the run file to the export."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
from rich.console import Console

from megatron_ssu.commands.export import export_run
from megatron_ssu.commands.phases import take_optimizer, train_phases
from megatron_ssu.commands.start import start
from megatron_ssu.config.length import with_epochs
from megatron_ssu.config.load import save_run
from megatron_ssu.config.schema import DataSource, RegularizeSection, RunConfig, ScheduleSection
from megatron_ssu.config.sources import completed, isolates, replay_sources, replays
from megatron_ssu.config.units import parse_split
from megatron_ssu.data.datasets import Parts, Settings, build_valid
from megatron_ssu.data.indexed import content_digest
from megatron_ssu.data.run_datasets import Prefixes, data_directory, prepare_run, present_train, run_tokenizer
from megatron_ssu.data.tokenizer import Tokenizer
from megatron_ssu.engine.device import device_name
from megatron_ssu.engine.ranks import gathered, is_rank_zero, on_all_ranks, on_rank_zero
from megatron_ssu.errors import STATUS_NOT_FINITE, TrainingStopped, UserError
from megatron_ssu.estimate.flops import flops_per_token
from megatron_ssu.estimate.hardware import peak_flops
from megatron_ssu.evaluate.callback import Asking
from megatron_ssu.evaluate.questions import read_questions
from megatron_ssu.generate.replay import with_answers
from megatron_ssu.methods.base import Job, Method, nothing_frozen
from megatron_ssu.methods.registry import method_of
from megatron_ssu.models.parallel_model import ParallelModel, build_model, open_model
from megatron_ssu.models.source import Source
from megatron_ssu.shield.shield_file import Shield
from megatron_ssu.train.callbacks.base import Callback
from megatron_ssu.train.checkpoints import Checkpoints, Progress
from megatron_ssu.train.identity import identity_of
from megatron_ssu.train.loop import Datasets, train
from megatron_ssu.train.resume_check import check_exported, may_be_exported, newest
from megatron_ssu.train.run_lock import held
from megatron_ssu.train.sinks import check_wandb
from megatron_ssu.train.telemetry import Telemetry, log_to_file
from megatron_ssu.train.trainer import Trainer

log = logging.getLogger(__name__)


def run(run_file: RunConfig, options: argparse.Namespace, console: Console) -> int:
    if run_file.phases:
        train_phases(run_file, console, train_run)
    else:
        train_run(run_file, console)
    return 0


def train_run(run: RunConfig, console: Console, before: RunConfig | None = None) -> Progress:
    """Make what is missing (datasets, scores, shield), train, and export where the run file asks for it.

    A run that begins takes its optimizer over from the last checkpoint of the run `before`, which ended with its model.
    """
    method = method_of(run)
    source = start(run, method, training=True)
    evaluators = _evaluators(run)
    with held(run.checkpoint.directory, "train"):
        return _train(run, method, source, console, before, evaluators)


def _train(
    run: RunConfig,
    method: Method,
    source: Source,
    console: Console,
    before: RunConfig | None,
    evaluators: Sequence[Callback],
) -> Progress:
    if run.replay.generate is not None and replays(run):
        run = with_answers(run, source, console)
    if run.train.epochs is not None:
        run = _with_epochs(run, source, console)
    checkpoints = Checkpoints(run.checkpoint.directory)
    latest = on_rank_zero(lambda: newest(run, method, checkpoints))
    exported = on_rank_zero(lambda: may_be_exported(run, latest))
    on_rank_zero(lambda: _begin_directory(run))
    with closing(on_all_ranks(lambda: _log(run))):
        return _logged(run, method, source, console, before, evaluators, checkpoints, latest, exported)


def _logged(
    run: RunConfig,
    method: Method,
    source: Source,
    console: Console,
    before: RunConfig | None,
    evaluators: Sequence[Callback],
    checkpoints: Checkpoints,
    latest: int | None,
    exported: bool,
) -> Progress:
    tokenizer = on_all_ranks(lambda: run_tokenizer(run))
    if exported:
        digests_of = partial(_digests_or_saved, run, tokenizer)
        shield_of = partial(method.present_shield, run, source)
        on_rank_zero(lambda: check_exported(run, method, source, checkpoints, shield_of, digests_of))
        console.print(f"{run.checkpoint.export}: the run has ended and is exported; nothing to do", highlight=False)
        return Progress(run.train.iterations, run.train.iterations * run.train.global_batch_size)
    on_rank_zero(lambda: method.check(run, source, begun=latest is not None))
    prefixes = on_rank_zero(lambda: prepare_run(run, tokenizer, console)[0])
    saved = None if latest is None else on_rank_zero(lambda: checkpoints.read_common(latest)["progress"])
    model = open_model(run, source)
    datasets = on_all_ranks(lambda: _datasets(run, method, source.dims.vocab, prefixes, tokenizer, saved))
    fresh = partial(build_model, run, source, model.mesh)
    job = Job(model, latest is not None, partial(probe, datasets), fresh, datasets.train_digests)
    del model  # the method may replace it
    shield = method.prepare(job) or nothing_frozen(method.name, source)
    session = job.model
    identity = identity_of(run, method, shield, datasets.train_digests)
    trainer = Trainer(session, shield, method)
    on_all_ranks(lambda: _check_trains(trainer))
    progress = Progress()
    if latest is not None:
        progress = checkpoints.load(latest, session, identity, trainer.optimizer_state, method)
        trainer.resume(progress)
    elif before is not None:
        take_optimizer(before, trainer, shield)
    on_rank_zero(lambda: save_run(run, Path(run.checkpoint.directory) / "run.yaml"))
    telemetry = _telemetry(session, console, progress)
    try:
        _announce(telemetry, session, method, shield, progress)
        progress = train(trainer, identity, datasets, telemetry, progress, _process_start(), evaluators=evaluators)
    finally:
        telemetry.close()
    if run.checkpoint.export:
        export_run(session, method, Path(run.checkpoint.export), identity.facts, progress, console)
    trainer.release()  # the next phase needs the memory
    return progress


def probe(datasets: Datasets, model: ParallelModel, iterations: int, optimizer: dict[str, Any]) -> Trainer:
    """A trainer that has trained all of the model's weights for some steps on the first training samples.

    `optimizer` is in place of train.optimizer; the learning rate is constant, without a warm-up or regularizers.
    Raises TrainingStopped after a step whose loss or gradient norm was not finite.
    """
    train = replace(
        model.run.train,
        iterations=iterations,
        schedule=ScheduleSection(decay_style="constant", warmup_fraction=0.0),
        regularize=RegularizeSection(),
        optimizer=optimizer,
    )
    trainer = Trainer(replace(model, run=replace(model.run, train=train)))
    batches = trainer.batches(datasets.train, 0)
    for number in range(iterations):
        step = trainer.step(batches)
        if step.skipped:
            first, name = number * train.global_batch_size, model.run.method.name
            raise TrainingStopped(
                f"method {name}: iteration {number + 1} of its probe, samples {first} to "
                f"{first + train.global_batch_size - 1}: loss {step.loss}, gradient norm {step.grad_norm}; no shield was made; "
                f"lower method.{name}.lr or look at these samples",
                STATUS_NOT_FINITE,
            )
    trainer.gather_weights()
    return trainer


def _evaluators(run: RunConfig) -> list[Callback]:
    """What the section `evaluate` asks for. Raises UserError where it cannot be read. Collective."""
    section = run.evaluate
    if not section.asks and section.stop_when is None and section.best is None:
        return []
    return [Asking(section, on_all_ranks(lambda: read_questions(section)) if section.asks else None)]


def _check_trains(trainer: Trainer) -> None:
    """Raises UserError where no rank has a parameter that trains. Collective."""
    if not any(gathered(any(p.requires_grad for chunk in trainer.session.chunks for p in chunk.parameters()))):
        raise UserError(f"method.name: {trainer.method.name} with these options leaves nothing to train; freeze less")


def _begin_directory(run: RunConfig) -> None:
    check_wandb(run)
    directory = Path(run.checkpoint.directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / "run.yaml").exists():  # an existing one is rewritten only after the resume check
            save_run(run, directory / "run.yaml")
    except OSError as error:
        raise UserError(f"checkpoint.directory: {directory} cannot be written: {error.strerror}") from error
    Checkpoints(directory).clean()


def _with_epochs(run: RunConfig, source: Source, console: Console) -> RunConfig:
    """The run file with the iterations of train.epochs, for which its data is prepared."""
    tokenizer = on_all_ranks(lambda: run_tokenizer(run))
    prefixes = on_rank_zero(lambda: prepare_run(run, tokenizer, console)[0])
    parts = on_all_ranks(lambda: _parts(run, source.dims.vocab, prefixes, tokenizer))
    assert run.train.epochs is not None
    return with_epochs(run, parts.samples_in(run.train.epochs))


def _settings(run: RunConfig, vocab: int) -> Settings:
    data = run.data
    return Settings(
        data.sequence_length,
        data.used_split,
        data.seed,
        isolates(run),
        data.weights_in,
        vocab,
        replayed=len(replay_sources(run)),
        replay=run.replay.fraction,
    )


def _parts(run: RunConfig, vocab: int, prefixes: Prefixes, tokenizer: Tokenizer) -> Parts:
    cache, with_valid = data_directory(run) / "index", not prefixes.target_valid and run.train.eval_batches > 0
    return Parts(prefixes.train, tokenizer, _settings(run, vocab), cache, with_valid=with_valid)


def _datasets(
    run: RunConfig, method: Method, vocab: int, prefixes: Prefixes, tokenizer: Tokenizer, saved: dict[str, Any] | None
) -> Datasets:
    """`saved`: the progress of the checkpoint that the run resumes from."""
    _warn_of_unused_documents(run)
    batch, settings = run.train.global_batch_size, _settings(run, vocab)
    parts = _parts(run, vocab, prefixes, tokenizer)
    trained, change = parts.blend(
        run.train.iterations * batch,
        reach=method.probe_iterations * batch,
        saved=saved and saved["blend"],
        at=saved["samples"] if saved else 0,
    )
    if change and is_rank_zero():
        log.warning("%s", change)
    from_split = None
    if not prefixes.target_valid and run.train.eval_batches:
        from_split = parts.valid(run.train.eval_batches * batch)
    how = completed(run, DataSource(""))
    watched: dict[str, Any] = {
        name: build_valid(path, tokenizer, settings, how)
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
    there = {content_digest(index.with_suffix(""))[:16] for index in data_directory(run).glob("*.idx")}
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


def _log(run: RunConfig) -> logging.Handler:
    rank = dist.get_rank()
    return log_to_file(Path(run.checkpoint.directory), rank, quiet=rank > 0)


def _process_start() -> float:
    """When this process began, on the clock of time.monotonic."""
    return time.monotonic() - (time.time() - psutil.Process().create_time())


def _announce(telemetry: Telemetry, session: ParallelModel, method: Method, shield: Shield, progress: Progress) -> None:
    section = session.run.train.regularize
    pulls = "".join(f", {name} {getattr(section, name):g}" for name in ("l2", "kl") if getattr(section, name))
    frozen = method.describe(shield) + pulls
    telemetry.say(
        f"{session.source.name} on {session.mesh}, {session.run.precision.dtype}: {frozen} ({method.name}: {method.summary})"
    )
    if progress.iteration:
        telemetry.say(f"resuming after iteration {progress.iteration}")
