"""What a data-parallel rank stores of a parameter's optimizer state: boxes of the tensor that the checkpoint holds.

The distributed optimizer owns a flat range of a parameter [R, C]. In the checkpoint the state is a tensor of the parameter's
global shape, so that it can be loaded on any mesh. The range is cut into rectangles of it: a partial first row, whole rows, a
partial last row. No rank has to collect what another one owns, on saving or on loading.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories


@dataclass(frozen=True)
class Box:
    """A rectangle of the stored tensor that holds [start, stop) of the flat parameter shard."""

    start: int
    stop: int
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]  # in the stored tensor
    whole: ShardedTensor  # of the model's weight: its key and global shape

    def sharded(self, name: str, data: torch.Tensor) -> ShardedTensor:
        """Optimizer state `name` of this box; `data` flat or not, with the box's elements."""
        return replace(
            self.whole,
            key=f"optimizer.state.{name}.{self.whole.key}",
            data=data.view(self.sizes),
            dtype=data.dtype,
            local_shape=self.sizes,
            global_offset=self.offsets,
            axis_fragmentations=None,  # no regular grid
            prepend_axis_num=0,
            replica_id=(*self.whole.replica_id[:2], 0),  # data-parallel ranks hold different boxes
        )


def stored_weights(model_state: dict[str, Any]) -> dict[torch.Tensor, ShardedTensor | ShardedTensorFactory]:
    """How the model's sharded state dict stores each parameter."""
    found, _ = extract_sharded_tensors_and_factories(model_state)
    return {entry.data: entry for entry in nested_values(found)}


def boxes(stored: ShardedTensor | ShardedTensorFactory, start: int, stop: int) -> list[Box]:
    """The boxes of the flat range [start, stop) of a parameter shard [R, C] or [n], in flat order."""
    weight = stored.data
    tensors = nested_values(stored.build()) if isinstance(stored, ShardedTensorFactory) else [stored]
    found: list[Box] = []
    for tensor in tensors:
        assert tensor.data.is_contiguous() and tensor.data.data_ptr() >= weight.data_ptr()
        first = tensor.data.storage_offset() - weight.storage_offset()  # a part of a fused weight
        low, high = max(start - first, 0), min(stop - first, tensor.data.numel())
        if low >= high:
            continue
        at = first + low
        for corner, sizes in _rectangles(tuple(tensor.local_shape), low, high):
            new = (*(1,) * tensor.prepend_axis_num, *sizes)
            corner = (*(0,) * tensor.prepend_axis_num, *corner)
            offsets = tuple(a + b for a, b in zip(tensor.global_offset, corner, strict=True))
            length = torch.Size(sizes).numel()
            found.append(Box(at, at + length, new, offsets, tensor.without_data()))
            at += length
    found.sort(key=lambda box: box.start)
    assert sum(box.stop - box.start for box in found) == stop - start
    return found


def _rectangles(shape: tuple[int, ...], low: int, high: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of the rectangles that make up the flat range [low, high) of a tensor [R, C] or [n]."""
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
