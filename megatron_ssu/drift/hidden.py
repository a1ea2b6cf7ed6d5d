"""How far hidden states drifted: two models on one mesh read the same text, layer by layer.

With x_t, y_t the outputs of a layer for token t, in model A and model B, over all n real tokens of the text:

    cosine       mean of x_t . y_t / (|x_t| |y_t|)
    cka          |C_yx|^2 / (|C_xx| |C_yy|), Frobenius norms of the centred (cross-)covariances: linear CKA (arXiv 1905.00414)
    covariance   |C_yy - C_xx| / |C_xx|
    mean         |mean y - mean x| / |mean x|

and of the last layer's predictions KL(A || B) and both losses, means over the predicted tokens. Sums of moments are kept,
[H, H] in fp64 per layer, and no hidden state longer than its micro-batch.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_ssu.config.schema import RunConfig
from megatron_ssu.data.calibration import Calibration
from megatron_ssu.engine.device import local_device
from megatron_ssu.engine.ranks import gathered
from megatron_ssu.errors import UserError
from megatron_ssu.models.parallel_model import ParallelModel, build_model, open_model
from megatron_ssu.models.source import Source
from megatron_ssu.ops.kl_divergence import kl_divergence
from megatron_ssu.train.micro_batches import Batch, read_batch, run_chunk, run_schedule
from megatron_ssu.train.regularizers import forward_run


@dataclass
class Moments:
    """Sums over tokens of a layer's outputs x and y [tokens, H]."""

    count: float
    cosine: float
    sums: Tensor  # fp64 [2, H]: of x and y
    squares: Tensor  # fp64 [3, H, H]: of x x^T, y y^T, y x^T

    @classmethod
    def none(cls, width: int) -> Moments:
        where = local_device()
        return cls(
            0.0,
            0.0,
            torch.zeros(2, width, dtype=torch.float64, device=where),
            torch.zeros(3, width, width, dtype=torch.float64, device=where),
        )

    def add(self, x: Tensor, y: Tensor) -> None:
        x, y = x.double(), y.double()
        self.count += x.shape[0]
        self.cosine += float(torch.nn.functional.cosine_similarity(x, y, dim=1).sum())
        self.sums += torch.stack([x.sum(0), y.sum(0)])
        for number, (a, b) in enumerate(((x, x), (y, y), (y, x))):
            self.squares[number].addmm_(a.t(), b)

    def reduce(self, group: dist.ProcessGroup) -> None:
        """Sum over the ranks of a group. Collective."""
        if group.size() == 1:
            return
        numbers = torch.tensor([self.count, self.cosine], dtype=torch.float64, device=self.sums.device)
        for tensor in (numbers, self.sums, self.squares):
            dist.all_reduce(tensor, group=group)
        self.count, self.cosine = numbers.tolist()

    def measures(self) -> dict[str, float]:
        """cosine, cka, covariance and mean."""
        mean = self.sums / self.count
        xx, yy, yx = (
            self.squares[i] / self.count - torch.outer(mean[a], mean[b])
            for i, (a, b) in enumerate(((0, 0), (1, 1), (1, 0)))
        )
        norm = torch.linalg.matrix_norm
        return {
            "cosine": self.cosine / self.count,
            "cka": float(norm(yx) ** 2 / (norm(xx) * norm(yy))),
            "covariance": float(norm(yy - xx) / norm(xx)),
            "mean": float(torch.linalg.vector_norm(mean[1] - mean[0]) / torch.linalg.vector_norm(mean[0])),
        }


@dataclass
class HiddenDrift:
    """What two models make of a text: measures by layer, from 0, and of their predictions."""

    layers: dict[int, dict[str, float]]
    tokens: int
    kl: float
    losses: tuple[float, float]  # of A and of B

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "kl": self.kl,
            "loss": list(self.losses),
            "layers": {str(layer): values for layer, values in sorted(self.layers.items())},
        }


def compare_hidden(run: RunConfig, base: Source, others: list[Source], text: Calibration) -> list[HiddenDrift]:
    """Every model of `others` against the base on the run file's mesh, one after the other. Collective.

    Two models are held at a time, without their gradients. Raises UserError, on all ranks alike, for a model whose predictions
    are not finite.
    """
    length = text.tokens.shape[1]
    run = forward_run(
        replace(
            run,
            model=replace(run.model, path=str(base.path)),
            data=replace(run.data, sequence_length=length, train=[], packing="stream", cross_document_attention=True),
        )
    )
    first = open_model(run, base)
    found = []
    for other in others:
        second = build_model(replace(run, model=replace(run.model, path=str(other.path))), other, first.mesh)
        found.append(_compared(run, first, second, text))
        del second
        gc.collect()
    return found


def _compared(run: RunConfig, first: ParallelModel, second: ParallelModel, text: Calibration) -> HiddenDrift:
    models = (first, second)
    outputs: list[dict[int, Tensor]] = [{}, {}]
    handles = [
        layer.register_forward_hook(_keeper(outputs[number], layer.layer_number - 1))
        for number, model in enumerate(models)
        for layer in _layers(model)
    ]
    moments = {layer.layer_number - 1: Moments.none(first.config.hidden_size) for layer in _layers(first)}
    predicted = torch.zeros(4, dtype=torch.float64, device=local_device())  # tokens, KL, loss of A, loss of B
    try:
        for model in models:
            for chunk in model.chunks:
                chunk.eval()
        with torch.no_grad():
            for batch in _batches(run, first, text):
                logits = [_forward(run, model, batch) for model in models]
                real = batch["real"].to(local_device())
                for number, sums in moments.items():
                    x, y = (_tokens(kept.pop(number), real, first) for kept in outputs)
                    sums.add(x, y)
                if first.mesh.last_stage:
                    predicted += _predictions(models, logits, batch)
    finally:
        for handle in handles:
            handle.remove()
    return _collected(models, moments, predicted)


def _collected(
    models: tuple[ParallelModel, ParallelModel], moments: dict[int, Moments], predicted: Tensor
) -> HiddenDrift:
    model, data = models[0], parallel_state.get_data_parallel_group()
    for sums in moments.values():
        if model.config.sequence_parallel:
            sums.reduce(parallel_state.get_tensor_model_parallel_group())
        sums.reduce(data)
    mesh = model.mesh
    measured = {number: sums.measures() for number, sums in moments.items()}
    layers: dict[int, dict[str, float]] = {}
    for own in gathered(measured):
        layers |= own
    if data.size() > 1:
        dist.all_reduce(predicted, group=data)
    stages = gathered(predicted.tolist() if mesh.last_stage else None)
    tokens, kl, *losses = next(stage for stage in stages if stage is not None)
    count = max(tokens, 1.0)
    for read, loss in zip(models, losses, strict=True):
        if not math.isfinite(loss):
            raise UserError(f"{read.source.path}: its predictions are not finite; look for a broken checkpoint")
    return HiddenDrift(dict(sorted(layers.items())), int(tokens), kl / count, (losses[0] / count, losses[1] / count))


def _layers(model: ParallelModel) -> list[TransformerLayer]:
    return [m for chunk in model.chunks for m in chunk.modules() if isinstance(m, TransformerLayer)]


def _keeper(kept: dict[int, Tensor], number: int) -> Any:
    def keep(module: torch.nn.Module, arguments: Any, output: Any) -> None:
        kept[number] = output[0] if isinstance(output, tuple) else output  # [s, b, H], or this rank's part of s

    return keep


def _tokens(hidden: Tensor, real: Tensor, model: ParallelModel) -> Tensor:
    """[n, H]: those of real tokens among [s, b, H]; `real` bool [b, s]."""
    mask = real.t()
    if model.config.sequence_parallel:
        mask = mask.chunk(model.mesh.tensor)[model.mesh.tensor_rank]
    return hidden[mask]


def _batches(run: RunConfig, model: ParallelModel, text: Calibration) -> Iterator[Batch]:
    """This data-parallel rank's micro-batches, as many on every rank; rows of padding fill them up."""
    micro, mesh = run.train.micro_batch_size, model.mesh
    step = micro * mesh.data
    rows = text.tokens.shape[0]
    for first in range(0, -(-rows // step) * step, step):
        numbers = torch.arange(first + mesh.data_rank * micro, first + (mesh.data_rank + 1) * micro)
        there = numbers < rows
        own = numbers.clamp(max=rows - 1)
        tokens, real = text.tokens[own], text.mask[own] & there[:, None]
        following = torch.roll(tokens, -1, dims=1)
        predicts = real & torch.roll(real, -1, dims=1)
        predicts[:, -1] = False
        yield {
            "tokens": tokens,
            "labels": following,
            "loss_mask": predicts.float(),
            "position_ids": torch.arange(tokens.shape[1]).expand_as(tokens).contiguous(),
            "real": real,
        }


def _forward(run: RunConfig, model: ParallelModel, batch: Batch) -> Tensor | None:
    """Logits [b, s, V / TP] on the last stage."""
    inputs = {key: value for key, value in batch.items() if key != "real"}

    def step(iterator: Iterator[Batch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        return run_chunk(chunk, read_batch(iterator, run)), lambda logits, non_loss_data: logits

    outputs = run_schedule(run, step, model.chunks, iter([inputs]), 1, forward_only=True, collect=True)
    return outputs[0] if model.mesh.last_stage else None


def _predictions(models: tuple[ParallelModel, ParallelModel], logits: list[Tensor | None], batch: Batch) -> Tensor:
    """fp64 [4]: tokens predicted, and the sums over them of KL(A || B) and of both losses."""
    where, group = local_device(), parallel_state.get_tensor_model_parallel_group()
    mask, labels = batch["loss_mask"].to(where), batch["labels"].to(where)
    first, second = logits
    assert first is not None and second is not None
    divergence = kl_divergence(second.clone(), first.clone(), 1.0, group if group.size() > 1 else None)
    sums = [mask.sum(), (divergence * mask).sum()]
    for model, own in zip(models, (first, second), strict=True):
        losses = model.chunks[-1].compute_language_model_loss(labels.t(), own).t()
        sums.append((losses.float() * mask).sum())
    return torch.stack([value.double() for value in sums])
