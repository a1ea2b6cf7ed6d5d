"""How optimizer state lies in a checkpoint: boxes of tensors that are the same on every mesh.

The distributed optimizer owns a flat range of a parameter. What it stores of that range is cut into rectangles of a global
tensor: a partial first row, whole rows, a partial last row. No rank has to collect what another one owns, on saving or on
loading.

    a whole parameter            megatron's tensor of the model's weight, by megatron's key; in layers, where megatron stacks
                                 them, a tensor per layer with its number after the key: the same weight of another layer
                                 may be compact or frozen
    columns or rows of a matrix  the trainable ones of the whole matrix, [O, K] or [R, I], by the matrix's name
    elements of a matrix         the matrix [O, I], zeros where it is frozen, by its name
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor

from megatron_ssu.compact.matrix import CompactMatrix
from megatron_ssu.models.layout import Piece


@dataclass(frozen=True)
class Box:
    """A rectangle of a stored tensor."""

    key: str
    whole: tuple[int, ...]  # shape of the stored tensor
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int  # of its elements in the flat parameter: rows of `width`, `stride` apart
    width: int
    stride: int
    grows: bool = False  # other meshes may store it with more rows, which pad the vocabulary

    @property
    def elements(self) -> int:
        return torch.Size(self.sizes).numel()

    def of(self, flat: Tensor, first: int) -> Tensor:
        """View of the box's elements [rows, width] in `flat`, which begins with element `first` of the parameter."""
        rows = self.elements // self.width
        return flat.as_strided((rows, self.width), (self.stride, 1), flat.storage_offset() + self.start - first)

    def sharded(self, name: str, data: Tensor) -> ShardedTensor:
        """Optimizer state `name` of this box; `data` contiguous, with the box's elements."""
        return ShardedTensor(
            key=f"optimizer.state.{name}.{self.key}",
            data=data.view(self.sizes),
            dtype=data.dtype,
            local_shape=self.sizes,
            global_shape=self.whole,
            global_offset=self.offsets,
            axis_fragmentations=None,  # no regular grid
            replica_id=(0, 0, 0),  # data-parallel ranks hold different boxes
            allow_shape_mismatch=self.grows,
        )


Stored: TypeAlias = ShardedTensor | ShardedTensorFactory


def stored_weights(model_state: dict[str, Any]) -> dict[Tensor, Stored]:
    """How the model's sharded state dict stores each parameter."""
    found, _ = extract_sharded_tensors_and_factories(model_state)
    return {entry.data: entry for entry in nested_values(found)}


def whole_boxes(stored: Stored, start: int, stop: int) -> list[Box]:
    """The boxes of the flat range [start, stop) of a parameter [R, C] or [n] that trains as a whole."""
    weight = stored.data
    tensors = nested_values(stored.build()) if isinstance(stored, ShardedTensorFactory) else [stored]
    found: list[Box] = []
    for tensor in tensors:
        assert tensor.data.is_contiguous() and tensor.data.data_ptr() >= weight.data_ptr()
        first = tensor.data.storage_offset() - weight.storage_offset()  # a part of a fused weight
        low, high = max(start - first, 0), min(stop - first, tensor.data.numel())
        lead = tensor.prepend_axis_num
        key = ".".join((tensor.key, *map(str, tensor.global_offset[:lead])))
        whole, shape = tuple(tensor.global_shape[lead:]), tuple(tensor.local_shape)
        for corner, sizes in rectangles(shape, low, high):
            offsets = tuple(a + b for a, b in zip(tensor.global_offset[lead:], corner, strict=True))
            at = first + _flat(shape, corner)
            found.append(Box(key, whole, offsets, sizes, at, sizes[-1], shape[-1], tensor.allow_shape_mismatch))
    return found


def compact_boxes(matrix: CompactMatrix, start: int, stop: int) -> list[Box]:
    """The boxes of the flat range [start, stop) of a compact parameter; padding is in none."""
    part = matrix.part
    if part.kind == "element":
        return element_boxes(matrix, start, stop)
    rows, columns = part.real
    shape = (matrix.param.shape[0], matrix.param.shape[1])
    found = []
    for (row, column), (height, width) in rectangles(shape, start, stop):
        height, width = min(row + height, rows) - row, min(column + width, columns) - column
        if height > 0 and width > 0:
            offsets = (part.offset[0] + row, part.offset[1] + column)
            at = row * shape[1] + column
            found.append(Box(part.matrix.name, part.whole, offsets, (height, width), at, width, shape[1]))
    return found


def element_boxes(matrix: CompactMatrix, start: int, stop: int) -> list[Box]:
    """The boxes of the stretch of the weight's shard that holds trainable elements `start` to `stop` of a matrix.

    Together the ranks' stretches are the whole matrix: each ends before the next one's first trainable element.
    """
    places, shard = trainable_places(matrix), matrix.mask.shape[0] * matrix.mask.shape[1]

    def place(number: int) -> int:
        return 0 if number == 0 else int(places[number]) if number < len(places) else shard

    piece = matrix.part.piece
    return [] if piece is None else piece_boxes(piece, matrix.mask.shape[1], place(start), place(stop))


def piece_boxes(piece: Piece, width: int, start: int, stop: int) -> list[Box]:
    """The boxes of what the flat range [start, stop) of a shard with rows of `width` holds of one matrix."""
    found = []
    shape = (piece.matrix.shape[0], piece.matrix.shape[1])
    for run in piece.runs:
        first = run.shard_row * width
        low, high = max(start - first, 0), min(stop - first, run.count * width)
        for (row, column), sizes in rectangles((run.count, width), low, high):
            offsets = (run.matrix_row + row, piece.col_start + column)
            found.append(
                Box(piece.matrix.name, shape, offsets, sizes, first + row * width + column, sizes[1], width)  # type: ignore[arg-type]
            )
    return found


def trainable_places(matrix: CompactMatrix) -> Tensor:
    """int64 [n] on CPU: flat places in the shard of an element-shielded matrix's trainable elements, ascending."""
    mask = matrix.mask.to("cpu")
    return mask.expand(torch.ones(mask.size)).nonzero().view(-1)


def rectangles(shape: tuple[int, ...], low: int, high: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of the rectangles that make up the flat range [low, high) of a tensor [R, C] or [n]."""
    if low >= high:
        return
    if len(shape) == 1:
        yield (low,), (high - low,)
        return
    width = shape[1]
    (first, offset), (last, rest) = divmod(low, width), divmod(high, width)
    if first == last:
        yield (first, offset), (1, rest - offset)
        return
    if offset:
        yield (first, offset), (1, width - offset)
        first += 1
    if first < last:
        yield (first, 0), (last - first, width)
    if rest:
        yield (last, 0), (1, rest)


def _flat(shape: tuple[int, ...], corner: tuple[int, ...]) -> int:
    return corner[0] if len(shape) == 1 else corner[0] * shape[1] + corner[1]


def replicated(stored: Stored) -> bool:
    """Whether another tensor- or pipeline-parallel rank stores the same weight."""
    return any(stored.replica_id[:2])
