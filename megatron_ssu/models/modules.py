"""Layers that megatron-core lacks: norms that know tensor and sequence parallelism, and linear layers with a norm behind."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_ssu import runtime


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm over the last dimension, weight [H] in config.params_dtype.

    Under sequence parallelism each rank norms its own tokens; the mark on the weight lets megatron sum the weight's gradient
    over the tensor-parallel ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, device=runtime.device(), dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class ProjectionRMSNorm(torch.nn.Module):
    """RMSNorm over a whole projection whose heads are split over tensor-parallel ranks (OLMo-2's q_norm and k_norm).

    Input [s, b, n / TP, d]; weight [n * d / TP]. The sum of squares is all-reduced forward, and its gradient backward.
    """

    def __init__(self, hidden_size: int, config: Any, eps: float, *, heads: int) -> None:
        super().__init__()
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.width, self.eps = heads * hidden_size, eps
        local = self.width // self.tp_group.size()
        self.weight = torch.nn.Parameter(torch.ones(local, device=runtime.device(), dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(2).float()
        squares = flat.pow(2).sum(-1, keepdim=True)
        squares = reduce_from_tensor_model_parallel_region(squares, group=self.tp_group)
        squares = copy_to_tensor_model_parallel_region(squares, group=self.tp_group)
        normed = flat * torch.rsqrt(squares / self.width + self.eps)
        return (self.weight * normed).to(x.dtype).view(x.shape)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


@functools.cache
def with_output_norm(linear: type, norm: type) -> type:
    """A row-parallel linear class whose output, after the reduction, goes through a norm (`post_norm`)."""

    class RowParallelLinearNorm(linear):  # type: ignore[misc,valid-type]
        def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
            super().__init__(input_size, output_size, config=config, **kwargs)
            self.post_norm = norm(config=config, hidden_size=output_size, eps=config.layernorm_epsilon)

        def linear_output(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            return super().forward(x)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            output, bias = self.linear_output(x)
            return self.post_norm(output), bias

    return RowParallelLinearNorm


def mask_padded_vocabulary(output_layer: torch.nn.Module, vocab: int) -> None:
    """Take the rows that only pad the vocabulary out of the softmax: their logits become the lowest finite number."""
    group = parallel_state.get_tensor_model_parallel_group()
    per_rank = output_layer.output_size_per_partition
    real = min(per_rank, max(0, vocab - group.rank() * per_rank))
    if real == per_rank:
        return

    def mask(module: torch.nn.Module, args: Any, output: tuple) -> tuple:
        logits, bias = output
        logits[..., real:] = torch.finfo(logits.dtype).min
        return logits, bias

    output_layer.register_forward_hook(mask)
