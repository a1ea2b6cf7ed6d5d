"""A linear layer with adapters: Y = X W^T + scale (X A^T) B^T, where only X A^T [s, b, r] is exchanged between ranks.

With a column-parallel base every rank multiplies what it has of X, its part of the sequence under sequence parallelism, by A
before the gather. With a row-parallel base the ranks' X A^T are partial sums, reduced over the ranks before B. The adapters of
matrices that megatron fuses (q, k, v; gate, up) share GEMM and exchange. A layer's own forward pass is not touched, so
megatron's local layers and Transformer Engine's are served alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.nn.functional import linear

from megatron_ssu.adapters.matrix import AdaptedMatrix
from megatron_ssu.compact.selection import Blocks
from megatron_ssu.models.layout import LocalParam

PREFIX = "lora_"  # of the adapters' parameters on a layer


class AdaptedLinear:
    """The adapters of one linear layer, and its forward pass with them."""

    def __init__(
        self,
        module: Any,
        local: LocalParam,
        matrices: Sequence[AdaptedMatrix],
        scale: float,
        *,
        sequence_parallel: bool,
    ) -> None:
        """Registers the adapters on `module`, whose weight is that of `local`; before DDP wraps it."""
        self.local, self.matrices, self.scale = local, tuple(matrices), scale
        self.merged = False
        self._row_parallel, self._sequence_parallel = local.split == 1, sequence_parallel
        self._group = parallel_state.get_tensor_model_parallel_group()
        self._fused = _Fused(local, matrices)
        self._norms: list[Tensor] | None = None
        for matrix in self.matrices:
            for part in matrix.parts():
                name = part.matrix.name.rpartition(".")[2]  # lora_A, lora_B, lora_magnitude_vector
                module.register_parameter(f"{name}_{matrix.piece.matrix.kind}", part.param)
        module.register_state_dict_post_hook(_leave_out)
        # An adapter belongs to the linear layer, and comes before the norm that may follow.
        name = "linear_output" if hasattr(module, "linear_output") else "forward"
        self._layer = getattr(module, name)
        setattr(module, name, self.forward)

    def changed(self) -> None:
        """The adapters are others now: norms are computed anew."""
        self._norms = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The layer's own outputs [s, b, O] (or [s / TP, b, O]) and bias, adapted."""
        output, bias = self._layer(x, *args, **kwargs)
        if self.merged:
            return output, bias
        adapted = self._difference(x).add_(output)
        if self.matrices[0].magnitude is not None:
            adapted = (adapted * self._quotients()).to(output.dtype)
        return adapted, bias

    def _difference(self, x: Tensor) -> Tensor:
        """scale (X A^T) B^T, in the shape of the layer's output; new memory."""
        downs = [matrix.down for matrix in self.matrices]
        small = self._exchanged(linear(x, downs[0] if len(downs) == 1 else torch.cat(downs))) * self.scale
        parts = small.split([len(down) for down in downs], dim=-1)
        return self._fused.joined([linear(part, m.up) for part, m in zip(parts, self.matrices, strict=True)], fill=0.0)

    def _exchanged(self, small: Tensor) -> Tensor:
        """X A^T of this rank [.., r] -> what B multiplies: whole sequences for a column-parallel base, whole sums for a
        row-parallel one."""
        if self._row_parallel:
            if self._sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(small, group=self._group)
            return reduce_from_tensor_model_parallel_region(small, group=self._group)
        if self._sequence_parallel:
            return gather_from_sequence_parallel_region(small, tensor_parallel_output_grad=True, group=self._group)
        return copy_to_tensor_model_parallel_region(small, group=self._group)

    def _quotients(self) -> Tensor:
        """DoRA's magnitude / norm, fp32 [O] or [O / TP], 1 for matrices without an adapter."""
        if self._norms is None:
            self._norms = [matrix.row_norms(self.local.param, self.scale) for matrix in self.matrices]
        magnitudes = [matrix.magnitude.param for matrix in self.matrices]  # type: ignore[union-attr]
        return self._fused.joined([m / norm for m, norm in zip(magnitudes, self._norms, strict=True)], fill=1.0)

    def merge(self) -> None:
        """Write the adapters into the weight; the layer is its own again. Collective over tensor-parallel ranks for DoRA."""
        for matrix in self.matrices:
            matrix.merge(self.local.param, self.scale)
        self.merged = True


class _Fused:
    """Puts outputs of the adapted matrices where the layer has them."""

    def __init__(self, local: LocalParam, matrices: Sequence[AdaptedMatrix]) -> None:
        blocks = [(Blocks.of(piece, local.param.shape[0]), piece) for piece in local.pieces]
        blocks.sort(key=lambda found: found[0].first)
        numbers = {matrix.piece.matrix: number for number, matrix in enumerate(matrices)}
        self._groups = blocks[0][0].groups
        # For each matrix in the order of the block: its rows in a block, and its number among the adapted ones.
        self._order = [(block.count, numbers.get(piece.matrix)) for block, piece in blocks]

    def joined(self, parts: Sequence[Tensor], fill: float) -> Tensor:
        """[.., rows of the matrix] of each adapted matrix -> [.., O of the weight's shard], `fill` for the others."""
        if len(self._order) == 1:
            return parts[0]
        lead = parts[0].shape[:-1]
        columns = [
            parts[0].new_full((*lead, self._groups, count), fill)
            if number is None
            else parts[number].unflatten(-1, (self._groups, count))
            for count, number in self._order
        ]
        return torch.cat(columns, dim=-1).flatten(-2)


def _leave_out(module: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, _ in module.named_parameters(recurse=False):
        if name.startswith(PREFIX):
            state.pop(prefix + name, None)
