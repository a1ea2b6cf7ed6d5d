"""The weight gradients of Transformer Engine's layers: its seam for delayed weight gradients, used at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_ssu.compact.weight import CompactWeight, main_grad
from megatron_ssu.engine.linear import Gemm


class CompactStore:
    """Takes a layer's place for delayed weight gradients and adds them to the compact parameters right away.

    When a layer calls `put`, input and output gradient are whole on this rank, quantised in FP8, and the reduction of the input
    gradient is on its way: the GEMMs hide it. `multiply(gradients, x, grad_output, inputs, outputs)` adds a compact
    gradient dY[:, output]^T X[:, input] to each of `gradients`. Without it, and where elements are shielded, the layer's own
    GEMM computes the whole gradient in fp32 and the trainable part is picked from it.
    """

    def __init__(self, compact: CompactWeight, multiply: Gemm | None) -> None:
        elements = any(matrix.part.kind == "element" for matrix in compact.matrices)
        self.compact, self.multiply = compact, None if elements else multiply

    def delay_wgrad_compute(self) -> bool:
        """Whether the layer leaves its weight gradient to this store: always."""
        return True

    def prepare(self) -> None:
        """Give the weight what the layer asks for; after DDP wrapped the model and the optimizer was built."""
        weight: Any = self.compact.weight
        weight.requires_grad_(True)  # else the layer leaves its weight gradient out
        if self.multiply is None:
            weight.main_grad = _scratch(weight.shape, weight.device)
        else:  # a place that is never written
            weight.main_grad = torch.zeros(1, device=weight.device).expand(weight.shape)

    def put(self, tensors: list[Any], gemm: Callable[[Any, Any], Any]) -> None:
        """Add the gradient of X and dY = `tensors`; `gemm(x, dy)` is the layer's own, into `weight.main_grad`."""
        x, grad_output = tensors
        if isinstance(grad_output, Tensor) and grad_output.numel() == 0:  # of an expert that got no token
            pass
        elif self.multiply is None:
            whole = self.compact.weight.main_grad  # type: ignore[attr-defined]
            whole.zero_()
            gemm(x, grad_output)
            self.compact.add_dense(whole)
        else:
            gradients = [main_grad(param) for param in self.compact.params]
            outputs = [matrix.output for matrix in self.compact.matrices]
            self.multiply(gradients, x, grad_output, self.compact.inputs, outputs)
        self.compact.added()


@functools.cache
def _scratch(shape: torch.Size, device: torch.device) -> Tensor:
    """fp32; layers of one shape share it, since each reads what it wrote before another writes."""
    return torch.empty(shape, device=device)
