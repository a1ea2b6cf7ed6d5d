"""Where the linear layers of megatron-core and Transformer Engine let their weight gradients be computed elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from megatron.core.extensions import transformer_engine as extension
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

# gradients, x, grad_output, selected inputs, selected outputs; see te_gemm.multiply
Gemm = Callable[[Sequence[Tensor], Any, Any, Any, Sequence[Any]], None]


def is_local_linear(module: torch.nn.Module) -> bool:
    """Whether it is a linear layer of megatron-core's own."""
    return isinstance(module, ColumnParallelLinear | RowParallelLinear)


def is_engine_linear(module: torch.nn.Module) -> bool:
    """Whether it is a linear layer of Transformer Engine, with a norm fused into it or without?"""
    return extension.HAVE_TE and isinstance(module, extension.TELinear | extension.TELayerNormColumnParallelLinear)


def compute_with(module: Any, forward: Callable[..., Tensor]) -> None:
    """Let a local linear layer compute Y = X W^T, with what parallelism needs around it, by `forward`.

    It is called with megatron's arguments: input, weight, bias, allreduce_dgrad, sequence_parallel, tp_group and others.
    """
    module._forward_impl = forward


def give_weight_gradients_to(module: Any, store: Any) -> None:
    """Let a linear layer of Transformer Engine hand the operands of its weight gradient to `store` in the backward pass.

    `store.put([x, grad_output], gemm)` is called when both are gathered, and quantised in FP8, and while the input gradient is
    on its way; `store.delay_wgrad_compute()` must be True. The layer then adds to `weight.main_grad`, which must be there, and
    has no other gradient of its weight.
    """
    module.wgrad_store = store
    module.fuse_wgrad_accumulation = True


def accumulate_in_gemm(chunks: Iterable[torch.nn.Module]) -> int:
    """Let Transformer Engine's linear layers whose weights train add the gradients to `main_grad` in fp32, within the GEMM.

    megatron's setting for this, `gradient_accumulation_fusion`, also asks Apex of the local output layer; this does not. DDP
    must wrap the `chunks` before the first backward pass. Returns the number of layers.
    """
    count = 0
    for chunk in chunks:
        for module in chunk.modules():
            if is_engine_linear(module) and module.weight.requires_grad:
                module.fuse_wgrad_accumulation = True  # type: ignore[assignment]
                count += 1
    return count


def accumulating_gemm(gradient: Tensor, outputs: Tensor, inputs: Tensor) -> bool:
    """gradient += outputs^T inputs in one GEMM that accumulates in fp32; False where none is there.

    gradient fp32 [O, I], outputs [T, O] and inputs [T, I] in a 16-bit dtype, on CUDA.
    """
    if not (gradient.is_cuda and gradient.dtype == torch.float32):
        return False
    fused = _apex_gemm()
    if fused is not None:
        fused(inputs.contiguous(), outputs.contiguous(), gradient)
        return True
    if _addmm_has_out_dtype():
        torch.addmm(gradient, outputs.t(), inputs, out_dtype=torch.float32, out=gradient)  # type: ignore[call-overload]
        return True
    return False


@functools.cache
def _apex_gemm() -> Callable | None:
    """Apex's dW += dY^T X with bf16 operands and a fp32 sum, where Apex has been built with it."""
    try:
        import fused_weight_gradient_mlp_cuda
    except ImportError:
        return None
    return fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32


@functools.cache
def _addmm_has_out_dtype() -> bool:
    overload = getattr(torch.ops.aten.addmm, "dtype_out", None)
    return overload is not None
