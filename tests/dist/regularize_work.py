"""What the ranks of the regularizers' tests do: steps with train.regularize on samples some of whose tokens do not count."""

from __future__ import annotations

from typing import Any

import torch

from megatron_ssu.config.schema import (
    OPTIMIZER_DEFAULTS,
    DataSection,
    RegularizeSection,
    RunConfig,
    ScheduleSection,
    TrainSection,
)
from megatron_ssu.engine.optimizer import owned
from megatron_ssu.models.parallel_model import open_model
from megatron_ssu.shield.shield_file import load_shield
from megatron_ssu.train.trainer import Trainer
from tests.dist.work import GLOBAL_BATCH, LENGTH, RandomTokens, export, run_config

MICRO_BATCH = 2


class Masked(RandomTokens):
    """Of sample i the first i modulo 5 tokens do not count."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(index)
        sample["loss_mask"][: index % 5] = 0
        return sample


def regularized_run(
    model: str,
    parallel: dict[str, Any],
    steps: int,
    regularize: dict[str, float],
    *,
    dtype: str = "fp32",
    ddp: dict[str, Any] | None = None,
    transformer: dict[str, Any] | None = None,
) -> RunConfig:
    """Adam's eps is large: gradients that are rounding noise would move weights by the learning rate."""
    run = run_config(
        model,
        parallel,
        dtype,
        ddp,
        data=DataSection(sequence_length=LENGTH, loader_workers=0),
        train=TrainSection(
            iterations=steps,
            micro_batch_size=MICRO_BATCH,
            global_batch_size=GLOBAL_BATCH,
            eval_batches=1,
            schedule=ScheduleSection(warmup_fraction=0.1),
            regularize=RegularizeSection(**regularize),
            optimizer={**OPTIMIZER_DEFAULTS, "lr": 1e-2, "weight_decay": 0.1, "clip_grad": 0.5, "adam_eps": 1e-4},
        ),
    )
    run.model.transformer.update(transformer or {})
    return run


def train_regularized(
    model: str,
    parallel: dict[str, Any],
    steps: int,
    regularize: dict[str, float],
    shield_file: str | None = None,
    target: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """By step loss, grad norm, lr and the regularizers' values; the loss of an evaluation in the end."""
    session = open_model(regularized_run(model, parallel, steps, regularize, **options))
    trainer = Trainer(session, load_shield(shield_file) if shield_file else None)
    batches = trainer.batches(Masked(), 0)
    history = []
    for _ in range(steps):
        step = trainer.step(batches)
        history.append({"loss": step.loss, "grad_norm": step.grad_norm, "lr": step.lr, **step.terms})
    evaluated = trainer.evaluate(Masked())
    trainer.gather_weights()
    if target:
        export(session, target)
    return {
        "history": history,
        "evaluated": evaluated,
        "copies": 0 if trainer.regularizers.l2 is None else trainer.regularizers.l2.nbytes,
        "owned": sum(part.stop - part.start for part in owned(trainer.optimizer)),
        "weights": [p.detach().clone() for chunk in session.chunks for p in chunk.parameters()],
    }


def pull_of_drifted(model: str, shield_file: str, coefficient: float) -> list[dict[str, torch.Tensor]]:
    """bf16 training under a shield; of every weight with pinned elements: how far its main weight is from the source, what L2
    adds to a gradient of zeros, and where it is pinned."""
    session = open_model(regularized_run(model, {}, 5, {"l2": coefficient}, dtype="bf16"))
    trainer = Trainer(session, load_shield(shield_file))
    source = {part.param: part.main.clone() for part in owned(trainer.optimizer)}
    batches = trainer.batches(Masked(), 0)
    for _ in range(5):
        trainer.step(batches)
    pinned = {found.weight: found for found in trainer.compact.pinned.values()}
    parts = [part for part in owned(trainer.optimizer) if part.param in pinned]
    added = [torch.zeros(part.stop - part.start) for part in parts]
    assert trainer.regularizers.l2 is not None
    trainer.regularizers.l2.on_gradients(zip(parts, added, strict=True))
    return [
        {
            "moved": part.main.detach() - source[part.param],
            "added": gradient,
            "places": pinned[part.param].places(part.start, part.stop),
        }
        for part, gradient in zip(parts, added, strict=True)
    ]
