"""What the ranks of the adapters' tests do."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from megatron_ssu.adapters.settings import AdapterSettings
from megatron_ssu.commands.export import export
from megatron_ssu.commands.train import train_run
from megatron_ssu.config.schema import OPTIMIZER_DEFAULTS, CheckpointSection, DataSection, ScheduleSection, TrainSection
from megatron_ssu.engine.optimizer import owned
from megatron_ssu.methods.lora import LoraOptions, LowRankAdaptation
from megatron_ssu.methods.registry import read_run
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.parallel_model import open_model
from megatron_ssu.shield.shield_file import load_shield
from megatron_ssu.train.checkpoints import Checkpoints, Progress
from megatron_ssu.train.identity import Identity, model_facts
from megatron_ssu.train.trainer import Trainer
from tests.dist import work

LR, DECAY, CLIP = 5e-3, 0.1, 0.5


def start(
    model: str,
    parallel: dict[str, Any],
    settings: AdapterSettings,
    *,
    embeddings: bool = False,
    shield_file: str | None = None,
    dtype: str = "fp32",
    ddp: dict[str, Any] | None = None,
    transformer: dict[str, Any] | None = None,
    steps: int = 10,
    directory: str = "unused",
) -> tuple[Trainer, LowRankAdaptation]:
    """A trainer of a model with adapters, and its method; without files where there is no shield to start from."""
    run = work.run_config(
        model,
        parallel,
        dtype,
        ddp,
        data=DataSection(sequence_length=work.LENGTH, loader_workers=0),
        train=TrainSection(
            iterations=steps,
            micro_batch_size=2,
            global_batch_size=work.GLOBAL_BATCH,
            schedule=ScheduleSection(warmup_fraction=0.1),
            optimizer={**OPTIMIZER_DEFAULTS, "lr": LR, "weight_decay": DECAY, "clip_grad": CLIP},
        ),
        checkpoint=CheckpointSection(directory=directory),
    )
    run.model.transformer.update(transformer or {})
    fields = {name: getattr(settings, name) for name in ("rank", "alpha", "dora", "rslora", "seed")}
    options = LoraOptions(
        targets=list(settings.targets), embeddings=embeddings, shielded=shield_file is not None, **fields
    )
    method, session = LowRankAdaptation(options), open_model(run)
    base = load_shield(shield_file) if shield_file else None
    return Trainer(session, method._own_shield(session.source, base), method), method


def train_adapters(
    model: str, parallel: dict[str, Any], steps: int, settings: AdapterSettings, ids: torch.Tensor, **options: Any
) -> dict[str, Any]:
    """Losses, norms and rates by step, logits before and after, live and merged, and what trains on this rank."""
    target = options.pop("target", None)
    trainer, method = start(model, parallel, settings, steps=steps, **options)
    session, adapters = trainer.session, method._adapters_of(trainer.session)
    before = work.logits_of(session, ids)
    batches = trainer.batches(work.RandomTokens(), 0)
    history = []
    for _ in range(steps):
        step = trainer.step(batches)
        history.append((step.loss, step.grad_norm, step.lr))
    trainer.gather_weights()
    live = work.logits_of(session, ids)
    tensors = adapters.peft_tensors()
    method.before_export(session)
    merged = work.logits_of(session, ids)
    if target:
        work.export(session, target)
        method.export_files(session, Path(target))
    return {
        "history": history,
        "logits": (before, live, merged),
        "tensors": tensors,
        "trains": sorted(n for chunk in session.chunks for n, p in chunk.named_parameters() if p.requires_grad),
        "state": sorted(n for chunk in session.chunks for n in chunk.state_dict()),
        "owned": sum(part.stop - part.start for part in owned(trainer.optimizer)),
    }


def resume(
    model: str,
    parallel: dict[str, Any],
    settings: AdapterSettings,
    directory: str,
    span: tuple[int, int],
    steps: int,
    save_at: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Train steps `span` of a run of `steps`, from the checkpoint of its start; losses, adapters and optimizer state after."""
    trainer, method = start(model, parallel, settings, steps=steps, directory=directory, **options)
    session, checkpoints, progress = trainer.session, Checkpoints(directory), Progress()
    identity = Identity(model_facts(session.run, model_fingerprint(model)))
    if span[0]:
        progress = checkpoints.load(span[0], session, identity, trainer.optimizer_state, method)
        trainer.resume(progress)
    batches = trainer.batches(work.RandomTokens(), progress.samples)
    history = []
    for iteration in range(span[0] + 1, span[1] + 1):
        history.append(trainer.step(batches).loss)
        progress = Progress(iteration, iteration * work.GLOBAL_BATCH)
        if iteration == save_at:
            trainer.gather_weights()
            checkpoints.save(session, progress, identity, trainer.optimizer_state, method)
    adapters = method._adapters_of(session)
    return {
        "history": history,
        "adapters": [part.param.detach().clone() for part in adapters.parts()],
        "states": [state.detach().clone() for part in owned(trainer.optimizer) for state in part.states().values()],
        "tensors": adapters.peft_tensors(),
    }


def job(run_file: str, overrides: list[str], *, output: str | None = None) -> str:
    """`train`, or `export` to `output`, as the command line runs it; what it prints."""
    text = io.StringIO()
    run, console = read_run(run_file, overrides), Console(file=text)
    if output is None:
        train_run(run, console)
    else:
        export(run, output, None, console)
    return text.getvalue()
