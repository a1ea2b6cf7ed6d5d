"""Attention under context parallelism that runs on CPU: a stand-in for Transformer Engine's, for tests."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from tests.dist import work


class GatheredAttention(torch.nn.Module):
    """Causal attention over the whole sequences: [s / CP, b, heads, d] of all context-parallel ranks, of whose 2 CP parts
    rank r has the r-th and the r-th from the end."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        size, rank = group.size(), group.rank()

        def whole(x: Tensor) -> Tensor:
            gathered = gather_from_sequence_parallel_region(x.contiguous(), group=group)
            halves = [part.chunk(2) for part in gathered.chunk(size)]
            x = torch.cat([half[0] for half in halves] + [half[1] for half in reversed(halves)])
            return x.repeat_interleave(query.shape[2] // x.shape[2], dim=2).permute(1, 2, 0, 3)

        found = torch.nn.functional.scaled_dot_product_attention(whole(query), whole(key), whole(value), is_causal=True)
        parts = found.permute(2, 0, 1, 3).flatten(2).chunk(2 * size)
        return torch.cat([parts[rank], parts[2 * size - 1 - rank]])


class UnevenTokens(work.RandomTokens):
    """Samples of which different parts have no loss."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        mask = torch.ones(work.LENGTH)
        mask[: index % 7] = 0
        return {**sample, "loss_mask": mask}


def train_steps(model: str, parallel: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """`work.train_steps` with these samples, and with this attention where megatron's own cannot do it."""
    attention: Any = nullcontext()
    if "context_parallel_size" in parallel:
        attention = mock.patch.object(LocalSpecProvider, "core_attention", lambda self: GatheredAttention)
    with attention, mock.patch.object(work, "RandomTokens", UnevenTokens):
        return work.train_steps(model, parallel, *args, **kwargs)
