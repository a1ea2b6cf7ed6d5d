"""Flat ranges of parameters as boxes of stored tensors that are the same on every mesh."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from megatron_ssu.compact.matrix import CompactMatrix, part_of
from megatron_ssu.models.layout import LocalParam, Piece, Run, put
from megatron_ssu.models.matrix import Matrix
from megatron_ssu.shield.mask import Mask
from megatron_ssu.train.optimizer_state import OptimizerState
from megatron_ssu.train.stored import compact_boxes, whole_boxes


def stored_tensor(shape, layer, rank, *, gated=False, **options):
    """Layer `layer` of 3, tensor-parallel rank `rank` of 2 along the rows; its values, and where they belong."""
    data = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    layers = [] if layer is None else [(0, layer, 3)]
    axis = len(layers)
    found = ShardedTensor.from_rank_offsets(
        "w", data, *layers, (axis, rank, 2), replica_id=(0, 0, 1), prepend_axis_num=axis, **options
    )
    return data, apply_swiglu_sharded_factory(found, layers) if gated else found


def cuts(draw, numel, count=3):
    """Bounds of neighbouring ranges that make up [0, numel)."""
    return itertools.pairwise(sorted({0, numel, *(draw.randrange(numel + 1) for _ in range(count))}))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("shape", [(8,), (6, 5), (2, 1), (4, 7)])
def test_ranges_cover_the_stored_tensor_once(shape, layer, gated):
    draw, rank = random.Random(str((shape, layer, gated))), 1
    data, stored = stored_tensor(shape, layer, rank, gated=gated)
    numel = data.numel()
    whole = (2 * shape[0], *shape[1:])
    expected = torch.full(whole, -1.0)
    if gated:  # both halves of a rank's rows belong to matrices of their own
        for half, rows in enumerate(data.chunk(2)):
            first = half * shape[0] + rank * len(rows)
            expected[first : first + len(rows)] = rows
    else:
        expected[shape[0] :] = data
    for _ in range(20):
        target = torch.full(whole, -1.0)
        for low, high in cuts(draw, numel):
            boxes = whole_boxes(stored, low, high)
            assert sum(box.elements for box in boxes) == high - low
            for box in boxes:
                assert low <= box.start and box.start + box.elements <= high
                entry = box.sharded("exp_avg", box.of(data.view(-1)[low:high], low).contiguous())
                assert entry.key == f"optimizer.state.exp_avg.{'w' if layer is None else 'w.1'}"
                assert entry.global_shape == target.shape
                assert entry.replica_id == (0, 0, 0) and not entry.has_regular_grid
                place = target[entry.global_slice()]
                assert place.shape == entry.data.shape and (place == -1).all(), "twice"
                place.copy_(entry.data)
        assert torch.equal(target, expected)


def test_an_empty_range_has_no_boxes():
    _, stored = stored_tensor((6, 5), 0, 0)
    assert whole_boxes(stored, 7, 7) == []


def test_whole_rows_are_one_box():
    _, stored = stored_tensor((6, 5), None, 0)
    assert [b.sizes for b in whole_boxes(stored, 0, 30)] == [(6, 5)]
    assert [b.sizes for b in whole_boxes(stored, 3, 27)] == [(1, 2), (4, 5), (1, 2)]
    assert [b.sizes for b in whole_boxes(stored, 11, 14)] == [(1, 3)]


@pytest.mark.parametrize("grows", [False, True])
def test_a_padded_vocabulary_may_have_another_number_of_rows(grows):
    data, stored = stored_tensor((6, 5), None, 0, allow_shape_mismatch=grows)
    (box,) = whole_boxes(stored, 0, 30)
    assert box.sharded("exp_avg", data).allow_shape_mismatch is grows


ROWS, COLUMNS = 24, 40


@dataclass
class Cut:
    """How tensor-parallel ranks share a matrix out, and what else is in their shards of its weight."""

    split: int | None
    fused: bool = False
    padded: int = 0  # rows on each rank where the matrix is a padded vocabulary

    def piece(self, matrix: Matrix, rank: int, size: int) -> Piece | None:
        rows, columns = (0, ROWS), (0, COLUMNS)
        if self.split == 0:
            share = self.padded or ROWS // size
            rows = (min(ROWS, rank * share), min(ROWS, (rank + 1) * share))
        if self.split == 1:
            columns = (rank * COLUMNS // size, (rank + 1) * COLUMNS // size)
        count = rows[1] - rows[0]
        runs: tuple[Run, ...] = (Run(0, rows[0], count),)
        if self.fused:  # two rows of this matrix after one of another, again and again
            runs = tuple(Run(3 * group + 1, rows[0] + 2 * group, 2) for group in range(count // 2))
        return Piece(matrix, runs, *columns) if count else None

    def shard(self, piece: Piece | None) -> tuple[int, int]:
        if piece is None:
            return self.padded, COLUMNS
        return self.padded or piece.rows * 3 // (2 if self.fused else 3), piece.col_stop - piece.col_start


def compact_matrix(matrix: Matrix, values: torch.Tensor, mask: Mask | None, cut: Cut, rank: int, size: int):
    """What a rank trains of a matrix that holds `values`. Other elements of its shard are -7."""
    peers = [cut.piece(matrix, peer, size) for peer in range(size)]
    pieces = tuple(() if piece is None else (piece,) for piece in peers)
    piece = peers[rank]
    shard = torch.nn.Parameter(torch.full(cut.shard(piece), -7.0))
    if piece is not None:
        put(shard.data, piece, values[piece.index])
    local = LocalParam("w", shard, (matrix,), pieces[rank], pieces, cut.split, True)
    part = part_of(local, matrix, mask)
    assert part is not None
    return CompactMatrix.of(shard, part)


def state_of(matrix: CompactMatrix) -> OptimizerState:
    return OptimizerState(None, SimpleNamespace(matrix=lambda param: (matrix, None)))  # type: ignore[arg-type]


def save(matrices, draw):
    """The stored tensor, and how often each of its elements was written; the matrices' ranges are cut at random."""
    whole = matrices[0].part.whole
    target, times = torch.full(whole, -1.0), torch.zeros(whole, dtype=torch.int64)
    for matrix in matrices:
        flat = matrix.param.detach().view(-1)
        for low, high in cuts(draw, flat.numel()):
            boxes = compact_boxes(matrix, low, high)
            part = SimpleNamespace(param=matrix.param, start=low, stop=high)
            for box, data in zip(boxes, state_of(matrix)._cut(part, flat[low:high], boxes), strict=True):
                entry = box.sharded("exp_avg", data)
                assert entry.key == f"optimizer.state.exp_avg.{matrix.part.matrix.name}" and entry.global_shape == whole
                assert not entry.allow_shape_mismatch
                target[entry.global_slice()] = entry.data
                times[entry.global_slice()] += 1
    return target, times


def load(matrix, stored, draw):
    """A compact parameter's state out of the stored tensor."""
    found = torch.full((matrix.param.numel(),), -1.0)
    for low, high in cuts(draw, found.numel()):
        boxes = compact_boxes(matrix, low, high)
        parts = [stored[box.sharded("exp_avg", torch.empty(box.elements)).global_slice()].clone() for box in boxes]
        part = SimpleNamespace(param=matrix.param, start=low, stop=high)
        found[low:high] = state_of(matrix)._joined(part, found[low:high], boxes, parts)
    return found.view(matrix.param.shape)


def drawn_mask(kind, matrix, draw, trains):
    """`trains`: some of it, on either rank a number of its own; or "first", of the first half of rows and columns alone."""
    if kind is None:
        return None
    shape = matrix.shape if kind == "element" else (matrix.shape[1 if kind == "column" else 0],)
    share = np.linspace(0.3, 0.9, shape[0])
    frozen = draw.random(shape) < (share[:, None] if len(shape) == 2 else share)
    if trains == "first":
        frozen[shape[0] // 2 :] = True
        if len(shape) == 2:
            frozen[:, shape[1] // 2 :] = True
    return Mask.of(kind, matrix.shape, frozen)


CUTS = {
    "replicated": Cut(None),
    "rows": Cut(0),
    "columns": Cut(1),
    "fused-rows": Cut(0, fused=True),
    "vocabulary": Cut(0, padded=32),  # of two ranks one has nothing but padding
}


@pytest.mark.parametrize("trains", ["some", "first"])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("kind", ["column", "row", "element", None])
def test_compact_parameters_move_between_meshes(kind, cut, trains):
    """On one or two tensor-parallel ranks, in any flat ranges: every trainable element is stored once and comes back."""
    matrix = Matrix("m", (ROWS, COLUMNS), 0, "q_proj")
    values = 1 + torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(matrix.shape)
    seed = random.Random(str((kind, cut, trains)))
    mask = drawn_mask(kind, matrix, np.random.default_rng(seed.randrange(1000)), trains)
    free = torch.ones(matrix.shape, dtype=torch.bool) if mask is None else torch.from_numpy(~mask.full())
    expected = values.where(free, 0)
    if kind == "column":
        expected = expected[:, free[0]]
    if kind == "row":
        expected = expected[free[:, 0]]
    ranks = {size: [compact_matrix(matrix, values, mask, cut, r, size) for r in range(size)] for size in (1, 2)}
    first, second = ranks[2]
    assert first.param.shape == second.param.shape, "megatron takes that for granted"
    if cut.padded or (trains == "first" and (kind, cut.split) in (("column", 1), ("row", 0))):
        assert not second.param.any() and second.mask.size == 0, "all of it is padding"
    elif trains == "some" and (kind, cut.split) in (("column", 1), ("row", 0)):
        assert first.part.real != second.part.real, "uneven numbers of columns or rows"
    for size, found in ranks.items():
        storing = found if cut.split is not None else found[:1]  # the others hold the same and store nothing
        for _ in range(10):
            target, times = save(storing, seed)
            assert torch.equal(target, expected) and (times == 1).all()
        for matrix in ranks[3 - size]:
            for _ in range(5):
                assert torch.equal(load(matrix, target, seed), matrix.param)


def test_padding_is_in_no_box():
    shape = (ROWS, COLUMNS)
    mask = Mask.of("column", shape, np.arange(COLUMNS) >= 19)
    found = compact_matrix(Matrix("m", shape, 0, "q_proj"), torch.ones(shape), mask, Cut(None), 0, 1)
    assert found.param.shape == (ROWS, 32)

    def boxes(start, stop):
        return [(box.offsets, box.sizes) for box in compact_boxes(found, start, stop)]

    assert boxes(0, ROWS * 32) == [((0, 0), (ROWS, 19))]
    assert boxes(19, 32) == []
    assert boxes(10, 3 * 32 + 5) == [((0, 10), (1, 9)), ((1, 0), (2, 19)), ((3, 0), (1, 5))]
