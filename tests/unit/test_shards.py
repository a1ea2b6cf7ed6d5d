"""Masks of shards: what they select, what they keep, what they refuse. The kernels are compared in test_kernels.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_ssu.compact.shards import RowRun, ShardMask
from megatron_ssu.ops import kernels


def columns(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def selected(mask: ShardMask) -> list[int]:
    """Flat places of the trainable elements in the compact tensor, -1 for padding."""
    places = torch.full((mask.size,), -1, dtype=torch.int32)
    mask.gather(torch.arange(mask.length, dtype=torch.int32), places)
    return places.tolist()


def test_fused_rows_each_use_their_own_columns() -> None:
    runs = [RowRun(0, 2, 0), RowRun(2, 3, 1), RowRun(3, 4, 2)]
    mask = ShardMask.from_patterns((4, 3), runs, [columns(0, 2), None, columns()])
    assert selected(mask) == [0, 2, 3, 5, 6, 7, 8]
    assert (mask.numel, mask.size, mask.frozen, mask.length) == (7, 7, 5, 12)


def test_rows_with_listed_columns_take_the_stride() -> None:
    runs = [RowRun(0, 2, 0), RowRun(2, 3, 1), RowRun(3, 4, 2), RowRun(4, 5, 3)]
    mask = ShardMask.from_patterns((5, 6), runs, [columns(0, 2, 5), None, columns(), columns(*range(6))], stride=8)
    padded = [0, 2, 5, *[-1] * 5, 6, 8, 11, *[-1] * 5, *range(12, 18), *range(24, 30), -1, -1]
    assert selected(mask) == padded
    assert (mask.numel, mask.size, mask.frozen) == (18, 30, 12)
    compact = mask.compact(torch.arange(30, dtype=torch.float16))
    assert compact.tolist() == [max(place, 0) for place in padded]
    assert mask.expand(compact, fill=-1.0).tolist() == [p if p in padded else -1 for p in range(30)]


def test_padding_is_neither_read_nor_written() -> None:
    mask = ShardMask.from_patterns((2, 5), [RowRun(0, 2, 0)], [columns(1, 4)], stride=16)
    out = torch.full((32,), 9.0)
    mask.gather(torch.arange(10.0), out)
    assert out[[0, 1, 16, 17]].tolist() == [1, 4, 6, 9] and int((out == 9.0).sum()) == 29
    full = torch.zeros(10)
    mask.scatter(out, full)
    assert full.tolist() == [0, 1, 0, 0, 4, 0, 6, 0, 0, 9]


def test_all_frozen_and_none_frozen() -> None:
    frozen = ShardMask.from_patterns((2, 3), [RowRun(0, 2, 0)], [columns()], stride=16)
    assert (frozen.numel, frozen.size, frozen.frozen) == (0, 0, 6)
    untouched, nothing = torch.arange(6, dtype=torch.bfloat16), torch.empty(0, dtype=torch.bfloat16)
    frozen.scatter(nothing, untouched)
    assert torch.equal(untouched, torch.arange(6, dtype=torch.bfloat16))
    assert torch.equal(frozen.expand(nothing, fill=2.0), torch.full((6,), 2.0, dtype=torch.bfloat16))
    for pattern in (None, columns(0, 1, 2)):  # every column listed is the same as no list
        free = ShardMask.from_patterns((2, 3), [RowRun(0, 1, 0), RowRun(1, 2, 0)], [pattern])
        assert (free.numel, free.size, free.frozen, len(free.host)) == (6, 6, 0, 1)
        assert torch.equal(free.compact(torch.arange(6.0)), torch.arange(6.0))


def test_parameters_that_require_gradients() -> None:
    for pattern in (None, columns(1)):
        mask = ShardMask.from_patterns((2, 3), [RowRun(0, 2, 0)], [pattern])
        weight = torch.nn.Parameter(torch.randn(6))
        part = torch.nn.Parameter(mask.compact(weight))
        mask.scatter(part, weight)
        mask.gather(weight, part)
        assert not mask.expand(part).requires_grad


def test_vectors_and_single_columns() -> None:
    vector = ShardMask.from_patterns((6,), [RowRun(0, 1, 0)], [columns(1, 3, 5)])
    assert vector.shape == (1, 6)
    assert selected(vector) == [1, 3, 5]
    thin = ShardMask.from_patterns((5, 1), [RowRun(0, 2, 0), RowRun(2, 3, 1), RowRun(3, 5, 0)], [None, columns()])
    assert selected(thin) == [0, 1, 3, 4]


@pytest.mark.parametrize("stride", [0, 16])
def test_expand_and_compact_are_inverse(stride: int) -> None:
    mask = ShardMask.from_patterns((8, 16), [RowRun(0, 8, 0)], [columns(*range(0, 16, 3))], stride)
    full = torch.randn(128)
    values = mask.compact(full)
    back = mask.expand(values, fill=-1.0)
    assert back.shape == (128,) and torch.equal(mask.compact(back), values)
    assert int((back == full).sum()) == mask.numel and int((back == -1.0).sum()) == mask.frozen


@pytest.mark.parametrize("shape", [(40, 501), (1, 8192), (3, 5461), (7, 1), (0, 4)], ids=str)
def test_element_masks_from_bools_and_from_packed_bits(shape: tuple[int, int]) -> None:
    frozen = np.random.default_rng(shape[1]).random(shape[0] * shape[1]) < 0.4
    expected = np.flatnonzero(~frozen).tolist()
    packed = np.packbits(frozen, bitorder="little")
    for given in (torch.from_numpy(frozen).view(shape), torch.from_numpy(packed), packed):
        mask = ShardMask.from_bits(shape, given)
        assert selected(mask) == expected
        assert mask.numel == mask.size == len(expected)


def test_index_stays_small() -> None:
    rows, width = 4096, 1024
    chosen = torch.randperm(width)[: width // 2].sort().values
    mask = ShardMask.from_patterns((rows, width), [RowRun(0, rows, 0)], [chosen])
    assert mask.nbytes < 8 * width
    runs = [RowRun(r, r + 1, r % 2) for r in range(rows)]
    assert ShardMask.from_patterns((rows, width), runs, [None, columns()]).nbytes <= 88 * rows
    elements = ShardMask.from_bits((rows, width), torch.rand(rows, width) < 0.5)
    assert elements.nbytes * 8 <= 1.02 * rows * width + 256


def test_offsets_are_64_bit() -> None:
    rows, width = 1 << 20, 1 << 14
    runs = [RowRun(0, rows - 1, 0), RowRun(rows - 1, rows, 0)]
    mask = ShardMask.from_patterns((rows, width), runs, [columns(*range(0, width, 2))])
    assert mask.numel == mask.size == rows * width // 2
    last = mask.host[-1].tolist()
    assert (last[kernels.COST], last[kernels.SRC]) == ((rows - 1) * width, (rows - 1) * width)
    assert last[kernels.OUT] == (rows - 1) * width // 2


@pytest.mark.parametrize(
    ("shape", "runs", "patterns", "stride", "says"),
    [
        ((4, 4), [RowRun(0, 3, 0)], [None], 0, "cover rows 0 to 4"),
        ((4, 4), [RowRun(0, 2, 0), RowRun(3, 4, 0)], [None], 0, "cover rows"),
        ((4, 4), [], [], 0, "cover rows"),
        ((4, 4), [RowRun(0, 4, 0)], [columns(2, 1)], 0, "ascend"),
        ((4, 4), [RowRun(0, 4, 0)], [columns(1, 1)], 0, "ascend"),
        ((4, 4), [RowRun(0, 4, 0)], [columns(4)], 0, "ascend"),
        ((4, 4), [RowRun(0, 4, 0)], [columns(-1, 2)], 0, "ascend"),
        ((4, 4), [RowRun(0, 4, 0)], [columns(0, 1, 2)], 2, "3 trainable columns do not fit into 2"),
        ((4, 4, 4), [RowRun(0, 4, 0)], [None], 0, "dimensions"),
    ],
)
def test_bad_masks_are_refused(shape, runs, patterns, stride, says) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=says):
        ShardMask.from_patterns(shape, runs, patterns, stride)


def test_bad_bits_and_bad_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="bool \\[12\\] or packed uint8 \\[2\\]"):
        ShardMask.from_bits((3, 4), torch.zeros(11, dtype=torch.bool))
    mask = ShardMask.from_bits((3, 4), torch.zeros(12, dtype=torch.bool))
    with pytest.raises(ValueError, match="12 elements, 12 of them in the compact tensor"):
        mask.gather(torch.zeros(11), torch.zeros(12))
    with pytest.raises(ValueError, match="one dtype of 2 or 4 bytes"):
        mask.gather(torch.zeros(12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64))
    with pytest.raises(ValueError, match="contiguous"):
        mask.gather(torch.zeros(24)[::2], torch.zeros(12))
    with pytest.raises(ValueError, match="one dtype"):
        mask.scatter(torch.zeros(12, dtype=torch.bfloat16), torch.zeros(12))
    with pytest.raises(ValueError, match="the mask is on cpu"):
        mask.scatter(torch.zeros(12, device="meta"), torch.zeros(12))


def test_to_the_same_device_is_the_same_mask() -> None:
    mask = ShardMask.from_patterns((2, 3), [RowRun(0, 2, 0)], [columns(1)])
    assert mask.to("cpu") is mask


def test_a_mask_without_frozen_elements_may_have_padding() -> None:
    """On this tensor-parallel rank every column trains, and on another one more do than here."""
    mask = ShardMask.from_patterns((2, 3), [RowRun(0, 2, 0)], [columns(0, 1, 2)], stride=8)
    compact = mask.compact(torch.arange(6.0))
    assert (mask.frozen, mask.size) == (0, 16) and compact.tolist() == [0, 1, 2, *[0] * 5, 3, 4, 5, *[0] * 5]
    assert torch.equal(mask.expand(compact), torch.arange(6.0))
