"""What the ranks of the adapters' tests do."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_ssu.adapters.adapters import Adapters, add_adapters
from megatron_ssu.adapters.freeze import adapter_shield, with_frozen_bases
from megatron_ssu.adapters.peft_files import write_peft
from megatron_ssu.adapters.settings import AdapterSettings
from megatron_ssu.config.schema import OPTIMIZER_DEFAULTS, DataSection, ScheduleSection, TrainSection
from megatron_ssu.engine.optimizer import owned
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.parallel_model import ParallelModel, open_model
from megatron_ssu.shield.shield_file import load_shield
from megatron_ssu.train import sharded_state
from megatron_ssu.train.checkpoints import Checkpoints, Progress
from megatron_ssu.train.identity import Identity
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
) -> tuple[Trainer, Adapters]:
    """A trainer of a model with adapters."""
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
    )
    run.model.transformer.update(transformer or {})
    session = open_model(run)
    matrices = list(session.source.family.matrices(session.source.dims))
    base = load_shield(shield_file) if shield_file else None
    shield = adapter_shield(
        matrices, settings, model="m", fingerprint=model_fingerprint(model), embeddings=embeddings, base=base
    )
    adapters = add_adapters(session, settings, base)
    trainer = Trainer(session, with_frozen_bases(shield, matrices, settings))
    trainer.compact.when_changed(adapters.changed)
    return trainer, adapters


def train_adapters(
    model: str, parallel: dict[str, Any], steps: int, settings: AdapterSettings, ids: torch.Tensor, **options: Any
) -> dict[str, Any]:
    """Losses, norms and rates by step, logits before and after, live and merged, and what trains on this rank."""
    target = options.pop("target", None)
    whole = ("embedding", "head") if options.get("embeddings") else ()
    trainer, adapters = start(model, parallel, settings, steps=steps, **options)
    session = trainer.session
    before = work.logits_of(session, ids)
    batches = trainer.batches(work.RandomTokens(), 0)
    history = []
    for _ in range(steps):
        step = trainer.step(batches)
        history.append((step.loss, step.grad_norm, step.lr))
    trainer.gather_weights()
    live = work.logits_of(session, ids)
    tensors = adapters.peft_tensors()
    adapters.merge()
    merged = work.logits_of(session, ids)
    if target:
        work.export(session, target)
        write_peft(adapters, Path(target) / "adapter", whole=whole)
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
    trainer, adapters = start(model, parallel, settings, steps=steps, **options)
    stock = sharded_state.model_state

    def with_adapters(session: ParallelModel) -> dict[str, Any]:
        return {**stock(session), "adapter": adapters.sharded_state()}

    checkpoints, progress = Checkpoints(directory), Progress()
    identity = Identity({"model": "m"})
    with mock.patch.object(sharded_state, "model_state", with_adapters):
        if span[0]:
            progress = checkpoints.load(span[0], trainer.session, identity, trainer.optimizer_state)
            trainer.resume(progress)
        batches = trainer.batches(work.RandomTokens(), progress.samples)
        history = []
        for iteration in range(span[0] + 1, span[1] + 1):
            history.append(trainer.step(batches).loss)
            progress = Progress(iteration, iteration * work.GLOBAL_BATCH)
            if iteration == save_at:
                trainer.gather_weights()
                checkpoints.save(trainer.session, progress, identity, trainer.optimizer_state)
    return {
        "history": history,
        "adapters": [part.param.detach().clone() for part in adapters.parts()],
        "states": [state.detach().clone() for part in owned(trainer.optimizer) for state in part.states().values()],
        "tensors": adapters.peft_tensors(),
    }
