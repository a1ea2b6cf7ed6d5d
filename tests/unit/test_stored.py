"""Flat ranges of parameters as boxes of the stored tensor."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from megatron_ssu.shield.stored import boxes


def stored_tensor(shape, layer, rank, *, gated=False):
    """Layer `layer` of 3, tensor-parallel rank `rank` of 2 along the rows; its values, and where they belong."""
    data = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    layers = [] if layer is None else [(0, layer, 3)]
    axis = len(layers)
    found = ShardedTensor.from_rank_offsets(
        "w", data, *layers, (axis, rank, 2), replica_id=(0, 0, 1), prepend_axis_num=axis
    )
    return data, apply_swiglu_sharded_factory(found, layers) if gated else found


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
        cuts = sorted({0, numel, *(draw.randrange(numel + 1) for _ in range(3))})
        target = torch.full(whole if layer is None else (3, *whole), -1.0)
        for low, high in itertools.pairwise(cuts):
            at = low
            for box in boxes(stored, low, high):
                assert box.start == at
                entry = box.sharded("exp_avg", data.view(-1)[box.start : box.stop])
                assert entry.key == "optimizer.state.exp_avg.w" and entry.global_shape == target.shape
                assert entry.replica_id == (0, 0, 0) and not entry.has_regular_grid
                place = target[entry.global_slice()]
                assert place.shape == entry.data.shape and (place == -1).all(), "twice"
                place.copy_(entry.data)
                at = box.stop
            assert at == high
        assert torch.equal(target if layer is None else target[layer], expected)
        assert layer is None or ((target[0] == -1) & (target[2] == -1)).all()


def test_an_empty_range_has_no_boxes():
    _, stored = stored_tensor((6, 5), 0, 0)
    assert boxes(stored, 7, 7) == []


def test_whole_rows_are_one_box():
    _, stored = stored_tensor((6, 5), None, 0)
    assert [b.sizes for b in boxes(stored, 0, 30)] == [(6, 5)]
    assert [b.sizes for b in boxes(stored, 3, 27)] == [(1, 2), (4, 5), (1, 2)]
    assert [b.sizes for b in boxes(stored, 11, 14)] == [(1, 3)]
