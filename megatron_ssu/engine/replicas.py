"""Tensors that all ranks of a group hold, of which each has been filled by one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_ssu.engine.device import local_device

BUCKET = 1 << 26  # bytes of small tensors that are sent together


def share(tensors: Sequence[torch.Tensor], owners: Sequence[int], group: dist.ProcessGroup) -> None:
    """Broadcast each tensor from its owner, a rank of `group`. Collective over the group.

    Contiguous tensors of any dtype, of the same sizes on all ranks. Those above BUCKET bytes that live on the rank's device are
    sent in place, others together, BUCKET bytes at a time.
    """
    if dist.get_world_size(group) == 1:
        return
    device, own = local_device(), dist.get_rank(group)
    for owner, batch in _batches(tensors, owners):
        source = dist.get_global_rank(group, owner)
        if len(batch) == 1 and batch[0].device == device:
            dist.broadcast(batch[0], source, group)
            continue
        buffer = torch.cat([part.to(device) for part in batch])
        dist.broadcast(buffer, source, group)
        if owner != own:
            for part, received in zip(batch, buffer.split([part.numel() for part in batch]), strict=True):
                part.copy_(received)


def _batches(tensors: Sequence[torch.Tensor], owners: Sequence[int]) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Neighbours of one owner, as bytes [n], of at most BUCKET in all or one alone."""
    batch: list[torch.Tensor] = []
    filled, last = 0, 0
    for tensor, owner in zip(tensors, owners, strict=True):
        part = tensor.view(-1).view(torch.uint8)
        if batch and (owner != last or filled + part.numel() > BUCKET):
            yield last, batch
            batch, filled = [], 0
        batch.append(part)
        filled, last = filled + part.numel(), owner
    if batch:
        yield last, batch
