"""Weights that train as a whole but for a few pinned elements, such as special tokens' rows or half of a norm.

A second copy of what trains would cost more than it saves. The gradient of pinned elements is zeroed before its norm is taken,
and their bits are put back whenever the weight has been updated.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_ssu.compact.matrix import row_runs
from megatron_ssu.compact.shards import ShardMask
from megatron_ssu.models.layout import LocalParam
from megatron_ssu.shield.mask import Mask


class PinnedWeight:
    """A parameter of this rank and its pinned elements."""

    def __init__(self, local: LocalParam, masks: dict[str, Mask]) -> None:
        self.weight = local.param
        self.pinned: ShardMask = pinned_elements(local, masks).to(local.param.device)
        self.kept: Tensor = self.pinned.compact(self._flat())

    def _flat(self) -> Tensor:
        return self.weight.detach().view(-1)

    def read(self) -> None:
        """The pinned elements are to stay what they are now."""
        self.pinned.gather(self._flat(), self.kept)

    def write(self) -> None:
        """Put the pinned elements back."""
        self.pinned.scatter(self.kept, self._flat())

    def places(self, start: int, stop: int) -> Tensor:
        """int64, ascending: where in the range [start, stop) of the flat weight pinned elements are, from `start` on."""
        marks = self.pinned.expand(self.kept.new_ones(self.pinned.size))
        return marks[start:stop].nonzero().view(-1)

    def drop_gradient(self) -> None:
        """Zero the pinned elements' gradient in DDP's buffer."""
        gradient: Tensor = self.weight.main_grad  # type: ignore[attr-defined]
        self.pinned.scatter(gradient.new_zeros(self.pinned.size), gradient.view(-1))


def pinned_elements(local: LocalParam, masks: dict[str, Mask]) -> ShardMask:
    """The frozen elements of a parameter [R, C] or [n] on this rank, as a mask that selects them."""
    shape = tuple(local.param.shape)
    rows, columns = (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])
    found = [(piece, masks[piece.matrix.name]) for piece in local.pieces if piece.matrix.name in masks]
    if len(shape) == 2 and all(mask.granularity == "row" for _, mask in found):
        state = np.zeros(rows, dtype=bool)  # without a bit for every element of an embedding
        for piece, mask in found:
            for run in piece.runs:
                state[run.shard_row : run.shard_row + run.count] = mask.bits(run.matrix_row, run.matrix_row + run.count)
        return ShardMask.from_patterns((rows, columns), row_runs(state), [torch.empty(0, dtype=torch.int64), None])
    selected = torch.zeros(shape[0], columns if len(shape) == 2 else 1, dtype=torch.bool)
    for piece, mask in found:
        frozen = mask.full()[piece.index]
        for run in piece.runs:
            first = run.matrix_row - piece.row_start
            part = frozen.reshape(piece.rows, -1)[first : first + run.count]
            selected[run.shard_row : run.shard_row + run.count] = torch.from_numpy(np.ascontiguousarray(part))
    return ShardMask.from_bits((rows, columns), ~selected.view(rows, columns))
