"""Whole tensors on rank 0 out of the pieces that the mesh holds, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_ssu.engine.device import local_device
from megatron_ssu.engine.mesh import Mesh
from megatron_ssu.models.layout import Layout, Piece, take
from megatron_ssu.models.matrix import Matrix

OwnPieces = dict[
    str, tuple[torch.Tensor, Piece]
]  # by the name of the piece's matrix: the shard that it is in, and where
Holders = dict[str, list[tuple[int, Piece]]]


def own_pieces(layout: Layout, mesh: Mesh) -> Iterator[tuple[torch.Tensor, Piece]]:
    """The shards and pieces of the model that this rank answers for: one of the tensor-parallel ranks for a replicated one."""
    for local in layout:
        if local.primary and (local.split is not None or mesh.tensor_rank == 0):
            for piece in local.pieces:
                yield local.param.data, piece


def holders_of(own: OwnPieces, mesh: Mesh) -> Holders:
    """Which ranks send which piece of every matrix: one copy of each, from the first data- and context-parallel rank.

    Collective.
    """
    sends = mesh.data_rank == 0 and mesh.context_rank == 0
    mine = [(name, mesh.rank, piece) for name, (_, piece) in own.items()] if sends else []
    gathered: list[Any] = [None] * mesh.world
    dist.all_gather_object(gathered, mine)
    holders: Holders = {}
    for part in gathered:
        for name, rank, piece in part:
            holders.setdefault(name, []).append((rank, piece))
    return holders


def collect(matrix: Matrix, dtype: torch.dtype, own: OwnPieces, holders: Holders, mesh: Mesh) -> torch.Tensor:
    """The whole matrix in `dtype` on rank 0's CPU; an empty tensor on the other ranks. Collective."""
    whole = torch.empty(matrix.shape if mesh.rank == 0 else 0, dtype=dtype)
    for rank, piece in holders[matrix.name]:
        part: Any = None
        if rank == mesh.rank:
            shard, mine = own[matrix.name]
            part = take(shard, mine).to(dtype).contiguous()
        if rank != 0 and mesh.rank == rank:
            dist.send(part, 0)
        if mesh.rank == 0:
            if part is None:
                shape = [s.stop - s.start for s in piece.index]
                part = torch.empty(shape, dtype=dtype, device=local_device())
                dist.recv(part, rank)
            whole[piece.index].copy_(part)
    return whole
