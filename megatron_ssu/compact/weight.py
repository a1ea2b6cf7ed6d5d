"""A shielded weight [O, I] of a layer and the compact parameters that train in its place."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ssu.compact.gemm import add_gemm
from megatron_ssu.compact.matrix import CompactMatrix
from megatron_ssu.compact.selection import Together, Workspace


@dataclass(frozen=True, eq=False)
class CompactWeight:
    """The weight, which asks for no gradient, and its matrices' trainable parts."""

    weight: torch.nn.Parameter
    matrices: tuple[CompactMatrix, ...]
    workspace: Workspace

    @property
    def params(self) -> tuple[torch.nn.Parameter, ...]:
        return tuple(matrix.param for matrix in self.matrices)

    @functools.cached_property
    def own_gemms(self) -> tuple[CompactMatrix, ...]:
        """Matrices whose gradients are GEMMs of selected outputs and inputs; those of elements are picked from whole ones."""
        return tuple(matrix for matrix in self.matrices if matrix.part.kind != "element")

    @functools.cached_property
    def inputs(self) -> Together:
        """What the matrices of `own_gemms` select of the weight's inputs."""
        return Together([matrix.input for matrix in self.own_gemms], self.workspace)

    def read(self) -> None:
        """The compact parameters become what the weight is."""
        for matrix in self.matrices:
            matrix.read(self.weight)

    def write(self) -> None:
        """The weight's trainable elements become what the compact parameters are."""
        for matrix in self.matrices:
            matrix.write(self.weight)

    def add_gradients(self, grad_output: Tensor, x: Tensor) -> None:
        """Add dY^T X to the compact parameters' gradients; grad_output [T, O], x [T, I]."""
        if len(x):  # an expert may get no token
            self._add(grad_output, x)
        self.added()

    def _add(self, grad_output: Tensor, x: Tensor) -> None:
        for matrix, inputs in zip(self.own_gemms, self.inputs.columns(x), strict=True):
            add_gemm(main_grad(matrix.param), matrix.output.columns(grad_output), inputs)
        elements = [matrix for matrix in self.matrices if matrix.part.kind == "element"]
        if elements:
            self.add_dense(grad_output.t().matmul(x), elements)

    def add_dense(self, gradient: Tensor, matrices: Sequence[CompactMatrix] | None = None) -> None:
        """Add what is trainable of a whole gradient [O, I] of the weight, in its dtype or fp32."""
        flat = gradient.reshape(-1)
        for matrix in self.matrices if matrices is None else matrices:
            target = main_grad(matrix.param).view(-1)[: matrix.mask.size]
            target.add_(matrix.mask.compact(flat))

    def added(self) -> None:
        """Mark the gradients as added: DDP's hooks then leave the placeholders alone."""
        for param in self.params:
            param.grad_added_to_main_grad = True  # type: ignore[attr-defined]

    def placeholders(self) -> tuple[Tensor, ...]:
        """What stands for the gradients, so that DDP's hooks fire; its memory is neither written nor read."""
        return tuple(_unread(p.shape, p.dtype, p.device).detach() for p in self.params)


def main_grad(param: torch.nn.Parameter) -> Tensor:
    """The gradient in DDP's buffer."""
    gradient: Tensor = param.main_grad  # type: ignore[attr-defined]
    return gradient


@functools.cache
def _unread(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)
