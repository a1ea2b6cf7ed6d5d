"""Layers that megatron-core lacks: norms that know tensor and sequence parallelism, and linear layers followed by a norm."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_ssu.engine.device import local_device


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm over the last dimension, weight [H] in config.params_dtype.

    Under sequence parallelism each rank norms its own tokens; the mark on the weight lets megatron sum the weight's gradient
    over the tensor-parallel ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, device=local_device(), dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class SplitRMSNorm(torch.autograd.Function):
    """y = x / rms * weight, computed in fp32, where each rank of `group` holds a part of every token's `width` elements.

    x and y [..., n, d] in any dtype, weight [n, d]. Kept for the backward pass are x as it came and 1 / rms, fp32
    [..., 1, 1]. Between the reductions there are only elementwise operations and sums, which torch.compile can fuse.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, width: int, eps: float, group: Any
    ) -> torch.Tensor:
        squares = x.float().square().sum((-2, -1), keepdim=True)
        dist.all_reduce(squares, group=group)
        scale = torch.rsqrt(squares / width + eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.width, ctx.group = width, group
        return (x * scale * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        by_output = grad_output * normed  # fp32
        dots = (by_output * weight).sum((-2, -1), keepdim=True)
        reducing = dist.all_reduce(dots, group=ctx.group, async_op=True)
        grad_weight = by_output.sum(tuple(range(x.dim() - 2))).to(weight.dtype)
        reducing.wait()
        grad_x = scale * (grad_output * weight.float() - normed * (dots / ctx.width))
        return grad_x.to(x.dtype), grad_weight, None, None, None


class ProjectionRMSNorm(torch.nn.Module):
    """RMSNorm over a whole projection whose heads are split over tensor-parallel ranks (OLMo-2's q_norm and k_norm).

    Input [s, b, n / TP, d]; weight [n * d / TP]. Where the heads are split, each direction all-reduces one number per token.
    """

    def __init__(self, hidden_size: int, config: Any, eps: float, *, heads: int) -> None:
        super().__init__()
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.width, self.eps = heads * hidden_size, eps
        local = self.width // self.tp_group.size()
        self.weight = torch.nn.Parameter(torch.ones(local, device=local_device(), dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tp_group.size() == 1:
            return torch.nn.functional.rms_norm(x.flatten(2), (self.width,), self.weight, self.eps).view(x.shape)
        return SplitRMSNorm.apply(x, self.weight.view(x.shape[2:]), self.width, self.eps, self.tp_group)

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
