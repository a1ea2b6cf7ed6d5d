"""Matrices, or rows of them, on chosen ranks, out of the shards that the ranks of a mesh hold."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
import torch.distributed as dist

from megatron_ssu.engine.device import local_device
from megatron_ssu.engine.mesh import Mesh, replica_group
from megatron_ssu.models.layout import Layout, LocalParam, Piece, take
from megatron_ssu.models.matrix import Matrix

PORTION = 1 << 25  # bytes that a rank collects at a time
_ALIGNED = 8  # parts of all dtypes begin at multiples of so many bytes


@dataclass(frozen=True)
class Rows:
    """Rows [first, stop) of a matrix, for a 1-D tensor elements, as `dtype`."""

    matrix: Matrix
    first: int
    stop: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.first, *self.matrix.shape[1:])


def portions(wanted: Iterable[tuple[Matrix, torch.dtype]], size: int) -> Iterator[list[Rows]]:
    """All rows of matrices, in order, in lists of at most `size` bytes, or of one row that is larger."""
    found: list[Rows] = []
    room = size
    for matrix, dtype in wanted:
        row = matrix.elements // max(1, matrix.shape[0]) * dtype.itemsize
        first = 0
        while first < matrix.shape[0]:
            if found and room < row:
                yield found
                found, room = [], size
            stop = min(matrix.shape[0], first + max(1, room // row))
            found.append(Rows(matrix, first, stop, dtype))
            room -= (stop - first) * row
            first = stop
    if found:
        yield found


@dataclass(frozen=True)
class _Holder:
    """A piece of a matrix and the ranks that hold it."""

    piece: Piece
    ranks: Sequence[int]


@dataclass(frozen=True)
class _Part:
    """What one rank sends to another, or has itself: a piece's part of the rows at `number` in the target's list."""

    source: int
    target: int
    number: int
    rows: Rows
    piece: Piece

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(s.stop - s.start for s in self.piece.index)

    @property
    def index(self) -> tuple[slice, ...]:
        """Where it lies in the rows."""
        rows = slice(self.piece.row_start - self.rows.first, self.piece.row_stop - self.rows.first)
        return (rows, *self.piece.index[1:])

    @property
    def nbytes(self) -> int:
        return self.piece.rows * (self.piece.col_stop - self.piece.col_start) * self.rows.dtype.itemsize

    @property
    def room(self) -> int:
        """Bytes that it takes in a buffer."""
        return -(-self.nbytes // _ALIGNED) * _ALIGNED

    def of(self, buffer: torch.Tensor, start: int) -> torch.Tensor:
        """Its place in a buffer [bytes], as a tensor of its shape and dtype."""
        return buffer[start : start + self.nbytes].view(self.rows.dtype).view(self.shape)


class PieceCollector:
    """Brings rows of matrices to any ranks, each piece from the nearest rank that holds it."""

    def __init__(
        self,
        own: Mapping[str, tuple[Callable[[], torch.Tensor], Piece]],
        mesh: Mesh,
        experts: Container[str] = (),
    ) -> None:
        """`own`: by the matrix's name the piece that this rank answers for, and its shard [R, C] or [n]: the same on all
        ranks of its `replica_group`. `experts`: which of them are experts'. Collective."""
        self.mesh, self._own = mesh, own
        self._holders = _holders({name: piece for name, (_, piece) in own.items()}, experts, mesh)

    @property
    def matrices(self) -> list[Matrix]:
        """All that some rank holds, by name."""
        return [self._holders[name][0].piece.matrix for name in sorted(self._holders)]

    def exchange(self, wanted: Mapping[int, Sequence[Rows]]) -> list[torch.Tensor]:
        """The rows that `wanted` has for this rank, on the CPU. Collective: `wanted` is the same on all ranks.

        Every rank sends one message to each rank that asks for something it is to give. Beside its result a rank holds the
        messages that it sends and receives, on its device the result as well.
        """
        own, device = self.mesh.rank, local_device()
        parts = list(self._parts(wanted))
        found = [torch.empty(rows.shape, dtype=rows.dtype, device=device) for rows in wanted.get(own, ())]
        for part in parts:
            if part.source == part.target == own:
                found[part.number][part.index].copy_(self._shard_of(part))
        moved = [part for part in parts if part.source != part.target]
        if moved:
            received = _received(moved, self._sent(moved), self.mesh)
            for part, tensor in received:
                found[part.number][part.index].copy_(tensor)
        return [rows.cpu() for rows in found]

    def each(self, wanted: Iterable[tuple[Matrix, torch.dtype]]) -> Iterator[tuple[Matrix, torch.Tensor]]:
        """All of `wanted` that some rank holds, in their order: the whole matrix on rank 0's CPU, an empty tensor on the
        other ranks. Collective."""
        first = self.mesh.rank == 0
        whole = torch.empty(0)
        held = ((matrix, dtype) for matrix, dtype in wanted if matrix.name in self._holders)
        for portion in portions(held, PORTION):
            found = self.exchange({0: portion})
            for number, rows in enumerate(portion):
                if rows.first == 0:
                    whole = torch.empty(rows.matrix.shape if first else 0, dtype=rows.dtype)
                if first:
                    whole[rows.first : rows.stop].copy_(found[number])
                if rows.stop == rows.matrix.shape[0]:
                    yield rows.matrix, whole

    def _parts(self, wanted: Mapping[int, Sequence[Rows]]) -> Iterator[_Part]:
        """What goes where, in an order that all ranks agree on."""
        for target in sorted(wanted):
            for number, rows in enumerate(wanted[target]):
                for holder in self._holders[rows.matrix.name]:
                    piece = holder.piece.within(rows.first, rows.stop)
                    if piece.rows:
                        source = min(holder.ranks, key=lambda rank: (abs(rank - target), rank))
                        yield _Part(source, target, number, rows, piece)

    def _shard_of(self, part: _Part) -> torch.Tensor:
        return take(self._own[part.rows.matrix.name][0](), part.piece)

    def _sent(self, moved: Sequence[_Part]) -> tuple[torch.Tensor, list[int]]:
        """This rank's messages one after the other, uint8, and the bytes of each by target rank."""
        mine = [part for part in moved if part.source == self.mesh.rank]
        buffer = torch.empty(sum(part.room for part in mine), dtype=torch.uint8, device=local_device())
        sizes, start = [0] * self.mesh.world, 0
        for part in mine:
            part.of(buffer, start).copy_(self._shard_of(part))
            sizes[part.target] += part.room
            start += part.room
        return buffer, sizes


def _received(
    moved: Sequence[_Part], sent: tuple[torch.Tensor, list[int]], mesh: Mesh
) -> Iterator[tuple[_Part, torch.Tensor]]:
    """Exchange messages; each part for this rank with its tensor."""
    ours = sorted((part for part in moved if part.target == mesh.rank), key=lambda part: part.source)
    sizes = [0] * mesh.world
    for part in ours:
        sizes[part.source] += part.room
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=local_device())
    dist.all_to_all_single(buffer, sent[0], sizes, sent[1])
    starts = accumulate((part.room for part in ours), initial=0)
    return ((part, part.of(buffer, start)) for part, start in zip(ours, starts, strict=False))


class Collector(PieceCollector):
    """The same of a model's matrices."""

    def __init__(self, layout: Layout, mesh: Mesh, values: Callable[[LocalParam], torch.Tensor] | None = None) -> None:
        """`values` gives the shard [R, C] or [n] of a parameter; its weight when left out. Collective."""
        shard_of = values or (lambda local: local.param.data)
        own = {p.matrix.name: (partial(shard_of, local), p) for local, p in _own_pieces(layout, mesh)}
        super().__init__(own, mesh, {matrix.name for local in layout if local.expert for matrix in local.matrices})


def _own_pieces(layout: Layout, mesh: Mesh) -> Iterator[tuple[LocalParam, Piece]]:
    for local in layout:
        if local.primary and (local.split is not None or local.expert or mesh.tensor_rank == 0):
            for piece in local.pieces:
                yield local, piece


def _holders(own: Mapping[str, Piece], experts: Container[str], mesh: Mesh) -> dict[str, list[_Holder]]:
    """Which ranks hold which piece of every matrix; the first of the replicas says it for all of them."""
    mine = [
        (
            [piece for name, piece in own.items() if (name in experts) == expert],
            dist.get_process_group_ranks(replica_group(expert=expert)),
        )
        for expert in (False, True)
        if mesh.first_replica(expert=expert)
    ]
    gathered: list[Any] = [None] * mesh.world
    dist.all_gather_object(gathered, mine)
    holders: dict[str, list[_Holder]] = {}
    for pieces, ranks in chain.from_iterable(gathered):
        for piece in pieces:
            holders.setdefault(piece.matrix.name, []).append(_Holder(piece, ranks))
    return holders
