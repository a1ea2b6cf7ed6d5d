"""Compact weight gradients in Transformer Engine's GEMM: bf16, and FP8 with delayed, current and 1 x 128 block scaling.

On Hopper an FP8 weight gradient reads X^T [I, T] and dY^T [O, T], which are there as bytes: selecting inputs or outputs is
selecting rows of them, with the scale of the whole tensor, or with the selected columns of the scales [T / 128, I] per block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ssu.engine.linear import accumulating_gemm


def multiply(gradients: Sequence[Tensor], x: Any, grad_output: Any, inputs: Any, outputs: Sequence[Any]) -> None:
    """Each gradient += dY[:, output]^T X[:, input]; fp32, contiguous; x [..., I], grad_output [..., O], bf16 or FP8.

    `outputs` are selections, one per gradient: `.columns(tensor [T, N])` and `.rows(tensor [N, T])`. `inputs` are as many, and
    `inputs.columns(tensor)` is a list of what all of them select. Raises TypeError for a quantised tensor of another kind.
    """
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    for gradient, operand, output in zip(gradients, select_all(x, inputs), outputs, strict=True):
        # Unlike Transformer Engine's, torch's GEMM reads some columns of dY where they are.
        if _is_plain(grad_output) and accumulating_gemm(gradient, output.columns(_flat(grad_output)), operand):
            continue
        general_gemm(
            operand,
            select(grad_output, output),
            out_dtype=gradient.dtype,
            layout="NT",
            out=gradient,
            accumulate=True,
            grad=True,
            use_split_accumulator=True,
        )


def select_all(tensor: Any, selections: Any) -> Iterable[Any]:
    """`select` for each of several selections: of a plain tensor at once, of a quantised one when it is asked for."""
    if _is_plain(tensor):
        return [columns.contiguous() for columns in selections.columns(_flat(tensor))]
    return (select(tensor, selection) for selection in selections)


def select(tensor: Any, selection: Any) -> Any:
    """The selected columns of a tensor [T, N], or [s, b, N] as layers keep their input, as an operand of the GEMM."""
    if _is_plain(tensor):
        return selection.columns(_flat(tensor)).contiguous()
    if hasattr(tensor, "_transpose"):
        return _per_tensor(tensor, selection)
    if hasattr(tensor, "_columnwise_data") and getattr(tensor, "_is_2D_scaled", True) is False:
        return _per_block(tensor, selection)
    raise TypeError(f"no compact weight gradient for {type(tensor).__name__}")


def _is_plain(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and not hasattr(tensor, "_quantizer")


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _per_tensor(tensor: Any, selection: Any) -> Any:
    from transformer_engine.pytorch import Float8TensorStorage

    if tensor._transpose is None or tensor._transpose_invalid:
        raise TypeError("an FP8 tensor without its transpose")
    data = tensor._transpose.view(tensor._transpose.shape[0], -1)
    return Float8TensorStorage(
        data=None,
        data_transpose=selection.rows(data).contiguous(),
        fp8_scale_inv=tensor._scale_inv,
        fp8_dtype=tensor._fp8_dtype,
        fake_dtype=tensor._dtype,
        quantizer=None,  # a copy of it would be made, which the GEMM does not read
    )


def _per_block(tensor: Any, selection: Any) -> Any:
    from transformer_engine.pytorch import Float8BlockwiseQTensorStorage

    data = tensor._columnwise_data.view(tensor._columnwise_data.shape[0], -1)
    picked = selection.rows(data).contiguous()
    scales = selection.columns(tensor._columnwise_scale_inv[:, : data.shape[0]])
    padded = torch.zeros(scales.shape[0], -(-scales.shape[1] // 4) * 4, dtype=scales.dtype, device=scales.device)
    padded[:, : scales.shape[1]] = scales
    return Float8BlockwiseQTensorStorage(
        rowwise_data=None,
        rowwise_scale_inv=None,
        columnwise_data=picked,
        columnwise_scale_inv=padded,
        fp8_dtype=tensor._fp8_dtype,
        quantizer=None,  # a copy of it would be made, which the GEMM does not read
        is_2D_scaled=False,
        fake_dtype=tensor._dtype,
    )


def is_available() -> bool:
    """Whether this rank's layers are Transformer Engine's."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE and torch.cuda.is_available()


class _Both:
    """A layer's weight gradient as it computes it, and compact ones of the same operands."""

    def __init__(self, gradients: list[Tensor], inputs: Any, outputs: Sequence[Any]) -> None:
        self.gradients, self.inputs, self.outputs = gradients, inputs, outputs

    def delay_wgrad_compute(self) -> bool:
        return True

    def put(self, tensors: list[Any], gemm: Any) -> None:
        x, grad_output = tensors
        gemm(x, grad_output)
        multiply(self.gradients, x, grad_output, self.inputs, self.outputs)


def both_gradients(
    config: Any, sizes: tuple[int, int, int], selected: tuple[Any, Sequence[Any]]
) -> tuple[list[Tensor], Tensor]:
    """fp32 gradients of a random layer for `sizes` = tokens, inputs, outputs: compact ones and the whole one.

    `selected`: inputs and outputs as `multiply` takes them.
    """
    import transformer_engine.pytorch as te
    from megatron.core.extensions.transformer_engine import FP8GlobalStateManager
    from megatron.core.fp8_utils import get_fp8_context

    tokens, inputs, outputs = sizes
    draw = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=draw).to(config.params_dtype)

    layer: Any = te.Linear(inputs, outputs, bias=False, params_dtype=config.params_dtype, device="cuda")
    layer.fuse_wgrad_accumulation = True
    layer.weight.main_grad = torch.zeros(outputs, inputs, device="cuda")
    compact = [torch.zeros_like(p, dtype=torch.float32) for p in pick(layer.weight.detach(), selected)]
    layer.wgrad_store = _Both(compact, *selected)
    try:
        with get_fp8_context(config):
            y = layer(random(tokens // 2, 2, inputs).requires_grad_())  # [s, b, inputs], as in a model
        y.backward(random(tokens // 2, 2, outputs))
    finally:
        if config.fp8:
            FP8GlobalStateManager.reset()  # it keeps the scales of layers that are gone
    return compact, layer.weight.main_grad


def pick(whole: Tensor, selected: tuple[Any, Sequence[Any]]) -> list[Tensor]:
    """The compact parts of a gradient [O, I]."""
    return [input.columns(output.rows(whole).contiguous()) for input, output in zip(*selected, strict=True)]
