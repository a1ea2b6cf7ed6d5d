"""KL(source || model) of logits whose vocabulary is split over tensor-parallel ranks, which are never gathered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_LEAST = -1e30  # below any logit that counts: where vocabularies are padded, logits are the lowest finite number
_ELEMENTS = 1 << 24  # logits that temporaries are made of at a time


def kl_divergence(
    logits: Tensor, source: Tensor, temperature: float = 1.0, group: dist.ProcessGroup | None = None
) -> Tensor:
    """T^2 KL(softmax(source / T) || softmax(logits / T)) by token (Hinton et al. 2015, arXiv 1503.02531).

    Collective over `group`, whose ranks have a part of the vocabulary each; None: this rank has all of it.

    Args:
        logits: [..., V / ranks], fp32, fp64 or bf16; may be overwritten afterwards.
        source: of the same shape; gets no gradient.
        temperature: T, above 0. T^2 keeps the gradient's scale whatever T is.
        group: tensor-parallel ranks.

    Returns:
        [...], fp32, or fp64 for fp64 logits; alike on all ranks of `group`.
    """
    return _VocabularyKL.apply(logits, source, temperature, group)


class _VocabularyKL(torch.autograd.Function):
    """With a = logits / T: KL = sum p (a_source - a) - lse(a_source) + lse(a), and d(T^2 KL) / d logits = T (q - p).

    q - p, in the dtype of the logits, is all that is kept for the backward pass.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: Tensor, source: Tensor, temperature: float, group: dist.ProcessGroup | None
    ) -> Tensor:
        pair = logits.reshape(-1, logits.shape[-1]), source.reshape(-1, source.shape[-1])
        tops = torch.stack([_scaled(part.amax(-1), temperature) for part in pair])  # [2, tokens]
        _reduce(tops, dist.ReduceOp.MAX, group)
        sums = tops.new_zeros(3, tops.shape[1])  # of exp(model), exp(source), exp(source) * (source - model)
        for rows in _blocks(*pair[0].shape):
            model, truth = (
                _scaled(part[rows], temperature) - top[rows, None] for part, top in zip(pair, tops, strict=True)
            )
            weights = truth.exp()
            sums[1, rows] = weights.sum(-1)
            sums[2, rows] = weights.mul_(truth.sub_(model)).sum(-1)
            sums[0, rows] = model.exp_().sum(-1)
        _reduce(sums, dist.ReduceOp.SUM, group)
        gaps = torch.empty_like(pair[0])
        for rows in _blocks(*gaps.shape):
            model, truth = (
                (_scaled(part[rows], temperature) - top[rows, None]).exp_().div_(total[rows, None])
                for part, top, total in zip(pair, tops, sums, strict=False)
            )
            gaps[rows] = model.sub_(truth)
        ctx.save_for_backward(gaps.view_as(logits))
        ctx.temperature = temperature
        divergence = sums[2] / sums[1] + (sums[0] / sums[1]).log_()
        return divergence.mul_(temperature**2).view(logits.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:  # type: ignore[override]
        (gaps,) = ctx.saved_tensors
        scale = (grad_output * ctx.temperature).unsqueeze(-1)
        # Multiplied in the scale's dtype and rounded once: one rounded scale would be off for all of a token's logits.
        return torch.mul(gaps, scale, out=torch.empty_like(gaps)), None, None, None


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """logits / T in fp32, fp64 for fp64; padding stays finite, and far below all others."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.div(temperature).clamp_(min=_LEAST)


def _blocks(tokens: int, vocabulary: int) -> Iterator[slice]:
    count = max(1, _ELEMENTS // vocabulary)
    for first in range(0, tokens, count):
        yield slice(first, min(first + count, tokens))


def _reduce(values: Tensor, kind: Any, group: dist.ProcessGroup | None) -> None:
    if group is not None:
        dist.all_reduce(values, op=kind, group=group)
