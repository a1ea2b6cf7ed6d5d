"""Whole matrices on one rank, out of the shards that the ranks of a mesh hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_ssu.engine.device import local_device
from megatron_ssu.engine.mesh import Mesh
from megatron_ssu.models.layout import Layout, LocalParam, Piece, take
from megatron_ssu.models.matrix import Matrix


class PieceCollector:
    """Brings matrices to one rank, one at a time: from the first data- and context-parallel rank that holds each piece."""

    def __init__(self, own: Mapping[str, tuple[Callable[[], torch.Tensor], Piece]], mesh: Mesh) -> None:
        """`own`: by the matrix's name the piece that this rank answers for, and its shard [R, C] or [n]. Collective."""
        self.mesh, self._own = mesh, own
        self._holders = _holders({name: piece for name, (_, piece) in own.items()}, mesh)

    @property
    def matrices(self) -> list[Matrix]:
        """All that some rank holds, by name."""
        return [self._holders[name][0][1].matrix for name in sorted(self._holders)]

    def __call__(self, matrix: Matrix, dtype: torch.dtype, to: int = 0) -> torch.Tensor:
        """The matrix on the CPU of rank `to` in `dtype`; an empty tensor on the other ranks. Collective."""
        mesh = self.mesh
        whole = torch.empty(matrix.shape if mesh.rank == to else 0, dtype=dtype)
        for rank, piece in self._holders[matrix.name]:
            part: Any = None
            if rank == mesh.rank:
                shard, mine = self._own[matrix.name]
                part = take(shard(), mine).to(dtype).contiguous()
            if rank != to and mesh.rank == rank:
                dist.send(part, to)
            if mesh.rank == to:
                if part is None:
                    shape = [s.stop - s.start for s in piece.index]
                    part = torch.empty(shape, dtype=dtype, device=local_device())
                    dist.recv(part, rank)
                whole[piece.index].copy_(part)
        return whole

    def each(self, matrices: Iterable[Matrix], dtype: torch.dtype) -> Iterator[tuple[Matrix, torch.Tensor]]:
        """All of `matrices` that some rank holds, in their order. Collective."""
        for matrix in matrices:
            if matrix.name in self._holders:
                yield matrix, self(matrix, dtype)


class Collector(PieceCollector):
    """The same of a model's matrices."""

    def __init__(self, layout: Layout, mesh: Mesh, values: Callable[[LocalParam], torch.Tensor] | None = None) -> None:
        """`values` gives the shard [R, C] or [n] of a parameter; its weight when left out. Collective."""
        shard_of = values or (lambda local: local.param.data)
        super().__init__({p.matrix.name: (partial(shard_of, local), p) for local, p in _own_pieces(layout, mesh)}, mesh)


def _own_pieces(layout: Layout, mesh: Mesh) -> Iterator[tuple[LocalParam, Piece]]:
    for local in layout:
        if local.primary and (local.split is not None or mesh.tensor_rank == 0):
            for piece in local.pieces:
                yield local, piece


def _holders(own: Mapping[str, Piece], mesh: Mesh) -> dict[str, list[tuple[int, Piece]]]:
    """Which ranks send which piece of every matrix."""
    sends = mesh.data_rank == 0 and mesh.context_rank == 0
    mine = [(name, mesh.rank, piece) for name, piece in own.items()] if sends else []
    gathered: list[Any] = [None] * mesh.world
    dist.all_gather_object(gathered, mine)
    holders: dict[str, list[tuple[int, Piece]]] = {}
    for part in gathered:
        for name, rank, piece in part:
            holders.setdefault(name, []).append((rank, piece))
    return holders
