"""What the ranks of the tests of packing do: losses and gradients of packed rows, and whole runs that count what they read."""

from __future__ import annotations

import argparse
import io
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from rich.console import Console

from megatron_ssu.commands.train import run as train
from megatron_ssu.config.schema import DataSection, TrainSection
from megatron_ssu.engine.ranks import gathered
from megatron_ssu.errors import TrainingStopped
from megatron_ssu.methods.registry import read_run
from megatron_ssu.models.parallel_model import open_model
from megatron_ssu.train.trainer import Trainer, mean_loss
from tests.dist import work
from tests.dist.methods_work import stopped_after


class Rows:
    """Samples that are given."""

    def __init__(self, samples: list[dict[str, torch.Tensor]]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self._samples[index]


def gradients(
    model: str,
    parallel: dict[str, Any],
    samples: list[dict[str, torch.Tensor]],
    micro_batch: int,
    target: str,
    transformer: dict[str, Any] | None = None,
    dtype: str = "fp32",
    isolated: bool = True,
    precision: dict[str, Any] | None = None,
    **train_options: Any,
) -> dict[str, Any]:
    """Loss of one global batch of these samples and its evaluation; its gradients are exported to `target` as weights are."""
    run = work.run_config(
        model,
        parallel,
        dtype,
        data=DataSection(
            train=["x"],
            sequence_length=samples[0]["tokens"].numel(),
            packing="documents",
            cross_document_attention=not isolated,
            loader_workers=0,
        ),
        train=TrainSection(
            iterations=1, micro_batch_size=micro_batch, global_batch_size=len(samples), eval_batches=1, **train_options
        ),
    )
    run.model.transformer |= transformer or {}
    run.precision.transformer.update(precision or {})
    session = open_model(run)
    trainer = Trainer(session)
    rows = Rows(samples)
    evaluated = trainer.evaluate(rows)
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    batches = trainer.regularizers.ahead(trainer.batches(rows, 0), trainer.micro_batches)
    loss = mean_loss(trainer._schedule(batches, trainer.micro_batches, forward_only=False))[0]
    terms = trainer.regularizers.values()
    with torch.no_grad():  # gradients in place of the weights, which are then exported by their names
        for chunk in session.chunks:
            for param in chunk.parameters():
                param.copy_(param.main_grad)
    work.export(session, target)
    return {"loss": loss, "evaluated": evaluated, "terms": terms}


def counted_run(file: str, folder: str, overrides: list[str], stop: int = 0) -> dict[str, Any]:
    """A run in `folder` that notes the samples of every batch that is really read; `stop`: after so many steps."""
    os.chdir(folder)
    run, text, seen, positions = read_run(file, overrides), io.StringIO(), [], []
    batches = Trainer.batches

    def noted(self: Trainer, dataset: Any, consumed: int) -> Any:
        for batch in batches(self, dataset, consumed):
            seen.extend(batch["tokens"].tolist())
            positions.extend(batch["position_ids"].tolist())
            yield batch

    Trainer.batches = noted  # type: ignore[method-assign]
    try:
        if stop:
            with stopped_after(stop), suppress(TrainingStopped):
                train(run, argparse.Namespace(), Console(file=text, width=200))
        else:
            train(run, argparse.Namespace(), Console(file=text, width=200))
    finally:
        Trainer.batches = batches  # type: ignore[method-assign]
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    everything = [row for rows in gathered(seen if first else []) for row in rows]
    places = [row for rows in gathered(positions if first else []) for row in rows]
    lines = [json.loads(line) for line in (Path(run.checkpoint.directory) / "metrics.jsonl").read_text().splitlines()]
    return {"rows": everything, "positions": places, "said": text.getvalue(), "metrics": lines}
