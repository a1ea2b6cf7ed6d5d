"""The GEMM of a weight gradient, which adds to a gradient that is there."""

from __future__ import annotations

from torch import Tensor

from megatron_ssu.engine.linear import accumulating_gemm


def add_gemm(gradient: Tensor, outputs: Tensor, inputs: Tensor) -> None:
    """gradient += outputs^T inputs; gradient [O, I] fp32 or of the operands' dtype, outputs [T, O], inputs [T, I].

    Accumulated in fp32 by the GEMM itself where dtypes and device allow; else rounded to the operands' dtype once, as
    megatron-core does without `gradient_accumulation_fusion`.
    """
    if gradient.dtype == outputs.dtype:
        gradient.addmm_(outputs.t(), inputs)
    elif not accumulating_gemm(gradient, outputs, inputs):
        gradient.add_(outputs.t().matmul(inputs))
