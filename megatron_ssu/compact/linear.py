"""How layers hand the gradients of shielded weights to their compact parameters.

megatron's local linear layers compute Y = X W^T in a function that can be replaced: here by one that takes X, W and the compact
parameters, communicates as megatron's own does, and adds dY^T X where it trains. Transformer Engine's layers keep their own
forward and backward pass and give the operands of the weight gradient away (store.py). Any other module, such as an embedding,
gets a view of its weight whose whole gradient is computed and then picked from.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ssu.compact.store import CompactStore
from megatron_ssu.compact.weight import CompactWeight
from megatron_ssu.engine.linear import Gemm, compute_with, give_weight_gradients_to, is_engine_linear, is_local_linear


def connect(module: torch.nn.Module, compact: CompactWeight, gemm: Gemm | None) -> CompactStore | None:
    """Let `module` give the gradient of its weight to the compact parameters; before DDP wraps it.

    Returns the store that Transformer Engine's layers have, which multiplies by `gemm`.
    """
    if is_local_linear(module):
        compute_with(module, _forward_of(compact))
        return None
    if is_engine_linear(module):
        store = CompactStore(compact, gemm)
        give_weight_gradients_to(module, store)
        _register_after(module, compact)
        return store
    _look_through(module, compact)
    return None


class _CompactLinear(torch.autograd.Function):
    """Y = X W^T with megatron's tensor-parallel communication; the weight gradient goes to the compact parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        compact: CompactWeight,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        group: Any,
        *params: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.compact, ctx.group = compact, group
        ctx.allreduce_dgrad, ctx.sequence_parallel = allreduce_dgrad, sequence_parallel
        total = _gathered(x, group)[0] if sequence_parallel else x
        return total.matmul(weight.t())

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gathering = reducing = None
        if ctx.sequence_parallel:
            x, gathering = _gathered(x, ctx.group, wait=False)
        grad_input = None
        if ctx.needs_input_grad[0]:
            grad_input, reducing = _input_gradient(ctx, grad_output.matmul(weight))
        if gathering is not None:
            gathering.wait()
        ctx.compact.add_gradients(grad_output.contiguous().flatten(0, -2), x.flatten(0, -2))
        if reducing is not None:
            reducing.wait()
        return grad_input, None, None, None, None, None, *ctx.compact.placeholders()


def _input_gradient(ctx: Any, whole: Tensor) -> tuple[Tensor, Any]:
    """The input gradient over the tensor-parallel ranks, and the handle of the exchange."""
    if ctx.allreduce_dgrad:
        return whole, dist.all_reduce(whole, group=ctx.group, async_op=True)
    if ctx.sequence_parallel:
        part = whole.new_empty((whole.shape[0] // ctx.group.size(), *whole.shape[1:]))
        return part, dist.reduce_scatter_tensor(part, whole, group=ctx.group, async_op=True)
    return whole, None


def _gathered(x: Tensor, group: Any, *, wait: bool = True) -> tuple[Tensor, Any]:
    """All ranks' parts of the sequence: [s / TP, b, I] -> [s, b, I], and the handle of the exchange."""
    whole = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    handle = dist.all_gather_into_tensor(whole, x.contiguous(), group=group, async_op=not wait)
    return whole, handle


def _forward_of(compact: CompactWeight) -> Any:
    def forward(
        input: Tensor,
        weight: Tensor,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        bias: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        output: Tensor = _CompactLinear.apply(  # type: ignore[no-untyped-call]
            input, weight, compact, allreduce_dgrad, sequence_parallel, tp_group, *compact.params
        )
        return output if bias is None else output + bias

    return forward


class _BiasGradient(torch.autograd.Function):
    """Identity on a layer's output Y = X W^T + b [..., O], whose gradient, summed over tokens, is that of b [O]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor]:
        return grad_y, grad_y.flatten(0, -2).sum(0)


def make_bias_gradient(module: Any) -> None:
    """Compute the gradient of the bias of a column-parallel layer beside the layer.

    megatron's and Transformer Engine's layers compute it with the weight's: not at all where the weight asks for none.
    """
    layer, bias = module.forward, module.bias

    def forward(*args: Any, **kwargs: Any) -> Any:
        # An attribute of the instance hides the parameter of that name.
        vars(module)["bias"] = bias.detach()
        try:
            output, left = layer(*args, **kwargs)
        finally:
            del vars(module)["bias"]
        return _BiasGradient.apply(output, bias), left  # type: ignore[no-untyped-call]

    module.forward = forward


class _BeforeLayer(torch.autograd.Function):
    """Identity on a layer's input: in the backward pass it comes after the layer, whose gradients are added by then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, compact: CompactWeight, *params: Tensor) -> Tensor:
        ctx.compact = compact
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor | None, ...]:
        return grad_x, None, *ctx.compact.placeholders()


def _register_after(module: Any, compact: CompactWeight) -> None:
    # Without the norm that may follow: its input gradient must not wait for the layer's.
    name = "linear_output" if hasattr(module, "linear_output") else "forward"
    layer = getattr(module, name)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        x = _BeforeLayer.apply(x, compact, *compact.params)  # type: ignore[no-untyped-call]
        return layer(x, *args, **kwargs)

    setattr(module, name, forward)


class _Through(torch.autograd.Function):
    """The weight itself, whose gradient [O, I] is picked from for the compact parameters."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, compact: CompactWeight, *params: Tensor) -> Tensor:
        ctx.compact = compact
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.compact.add_dense(gradient)
        ctx.compact.added()
        return None, None, *ctx.compact.placeholders()


def _look_through(module: Any, compact: CompactWeight) -> None:
    layer = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        # An attribute of the instance hides the parameter of that name.
        weight = _Through.apply(compact.weight, compact, *compact.params)  # type: ignore[no-untyped-call]
        vars(module)["weight"] = weight
        try:
            return layer(*args, **kwargs)
        finally:
            del vars(module)["weight"]

    module.forward = forward
