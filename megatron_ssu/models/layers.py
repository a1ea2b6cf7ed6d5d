"""Layers that megatron-core lacks: norms that know tensor and sequence parallelism, linear layers followed by a norm, attention
that differs from layer to layer, and what goes around the layers."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_ssu.engine.device import local_device


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm over the last dimension, weight [H] in config.params_dtype.

    Under sequence parallelism each rank norms its own tokens; the mark on the weight lets megatron sum the weight's gradient
    over the tensor-parallel ranks. With `config.layernorm_zero_centered_gamma` the weight is stored less 1, and the product is
    taken in fp32.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, device=local_device(), dtype=config.params_dtype)
        self.centred = config.layernorm_zero_centered_gamma
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.centred:
            return super().forward(x)
        width = tuple(self.normalized_shape)
        return torch.nn.functional.rms_norm(x.float(), width, 1.0 + self.weight.float(), self.eps).to(x.dtype)


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


class PositionedSelfAttention(SelfAttention):
    """Self-attention of a model whose layers do not all turn q and k alike."""

    def __init__(
        self, *args: Any, rope: int | None, stacked: bool, turned: tuple[int, float] | None, **kwargs: Any
    ) -> None:
        """`rope`: which of the stacked tables turns q and k (rope.RopeTables); None: none does. `turned`: how many channels of
        a head are turned, and what their part of q k^T is multiplied by."""
        super().__init__(*args, **kwargs)
        self.rope, self.stacked, self.turned = rope, stacked, turned

    def forward(self, hidden_states: torch.Tensor, *args: Any, rotary_pos_emb: Any = None, **kwargs: Any) -> Any:
        if self.rope is None:
            rotary_pos_emb = None
        elif self.stacked:
            rotary_pos_emb = rotary_pos_emb[self.rope]
        return super().forward(hidden_states, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        query, *others = super().get_query_key_value_tensors(*args, **kwargs)
        if self.turned is not None:
            channels, factor = self.turned
            query = torch.cat((query[..., :channels] * factor, query[..., channels:]), dim=-1)
        return query, *others


@functools.cache
def core_attention(base: type, window: int | None, scale: float | None, cap: float | None) -> type:
    """A core attention class of megatron's or Transformer Engine's with a layer's own window (tokens that a token sees, itself
    among them), scale of q k^T and cap of the scores; None: none, 1 / sqrt(head), none. Caps are for megatron's alone."""
    local = issubclass(base, DotProductAttention)

    class LayerCoreAttention(base):  # type: ignore[misc,valid-type]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            if scale is not None:
                kwargs["softmax_scale"] = scale
            if window is not None and not local:
                config = copy.copy(config)
                config.window_size, config.window_attn_skip_freq = (window - 1, 0), None
            super().__init__(config, *args, **kwargs)
            if local and (window is not None or cap is not None):
                self.scale_mask_softmax = _Softmax(self.scale_mask_softmax, window, cap)  # type: ignore[has-type]

    return LayerCoreAttention


class _Softmax(torch.nn.Module):
    """megatron's masked softmax of scores [b, n, s, t], capped and windowed before; a mask that is given stays."""

    def __init__(self, softmax: torch.nn.Module, window: int | None, cap: float | None) -> None:
        super().__init__()
        self.softmax, self.window, self.cap = softmax, window, cap

    def forward(self, scores: torch.Tensor, mask: torch.Tensor | None, offset: torch.Tensor | None = None) -> Any:
        if self.cap is not None:
            scores = self.cap * torch.tanh(scores / self.cap)
        if self.window is not None:
            hidden = _hidden(scores.shape[-2], scores.shape[-1], self.window, scores.device)
            mask = hidden if mask is None else mask | hidden
        return self.softmax(scores, mask, offset)


@functools.lru_cache(maxsize=4)
def _hidden(queries: int, keys: int, window: int, device: torch.device) -> torch.Tensor:
    """bool [queries, keys]: keys that come after a query, or `window` and more tokens before it."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance < 0) | (distance >= window)


def scale_embeddings(embedding: torch.nn.Module, factor: float) -> None:
    """Multiply the embeddings by `factor`, rounded to their dtype as transformers does."""
    embedding.register_forward_hook(
        lambda module, args, output: output * torch.tensor(factor, dtype=output.dtype).item()
    )


def cap_logits(output_layer: torch.nn.Module, cap: float) -> None:
    """Logits x become cap tanh(x / cap), before rows that pad the vocabulary are masked."""

    def capped(module: torch.nn.Module, args: Any, output: tuple) -> tuple:
        logits, bias = output
        return cap * torch.tanh(logits / cap), bias

    output_layer.register_forward_hook(capped)


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
