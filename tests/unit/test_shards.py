"""Masks of shards: what they select, what they keep, what they refuse. The kernels are compared in test_kernels.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_ssu.shield import kernels
from megatron_ssu.shield.shards import RowRun, ShardMask


def columns(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def selected(mask: ShardMask) -> list[int]:
    """Flat positions in the range, through gather."""
    return mask.compact(torch.arange(mask.length, dtype=torch.float32)).int().tolist()


def test_fused_rows_each_use_their_own_columns() -> None:
    runs = [RowRun(0, 2, 0), RowRun(2, 3, 1), RowRun(3, 4, 2)]
    mask = ShardMask.from_patterns((4, 3), runs, [columns(0, 2), None, columns()], 0, 12)
    assert selected(mask) == [0, 2, 3, 5, 6, 7, 8]
    assert (mask.numel, mask.frozen, mask.length) == (7, 5, 12)


@pytest.mark.parametrize("start", range(13))
def test_ranges_that_end_within_rows(start: int) -> None:
    for end in range(start, 13):
        mask = ShardMask.from_patterns((3, 4), [RowRun(0, 3, 0)], [columns(0, 1)], start, end)
        assert selected(mask) == [p - start for p in (0, 1, 4, 5, 8, 9) if start <= p < end]


def test_all_frozen_and_none_frozen() -> None:
    frozen = ShardMask.from_patterns((2, 3), [RowRun(0, 2, 0)], [columns()], 1, 6)
    assert (frozen.numel, frozen.frozen) == (0, 5)
    untouched = torch.arange(5, dtype=torch.bfloat16)
    frozen.scatter(torch.empty(0), untouched)
    assert torch.equal(untouched, torch.arange(5, dtype=torch.bfloat16))
    assert torch.equal(frozen.expand(torch.empty(0), fill=2.0), torch.full((5,), 2.0))
    for pattern in (None, columns(0, 1, 2)):  # every column listed is the same as no list
        free = ShardMask.from_patterns((2, 3), [RowRun(0, 2, 0)], [pattern], 1, 6)
        assert (free.numel, free.frozen, len(free.host)) == (5, 0, 1)
        assert torch.equal(free.compact(torch.arange(5, dtype=torch.bfloat16)), torch.arange(5, dtype=torch.float32))


def test_vectors_and_single_columns() -> None:
    vector = ShardMask.from_patterns((6,), [RowRun(0, 1, 0)], [columns(1, 3, 5)], 2, 6)
    assert vector.shape == (1, 6)
    assert selected(vector) == [1, 3]
    thin = ShardMask.from_patterns((5, 1), [RowRun(0, 2, 0), RowRun(2, 3, 1), RowRun(3, 5, 0)], [None, columns()], 1, 5)
    assert selected(thin) == [0, 2, 3]


def test_expand_and_compact_are_inverse() -> None:
    mask = ShardMask.from_patterns((8, 16), [RowRun(0, 8, 0)], [columns(*range(0, 16, 3))], 5, 120)
    values = torch.randn(mask.numel)
    full = mask.expand(values, fill=-1.0)
    assert full.dtype == torch.float32 and full.shape == (115,)
    assert torch.equal(mask.compact(full), values)
    assert int((full == -1.0).sum()) == mask.frozen


@pytest.mark.parametrize("start", [0, 1, 7, 8, 37])
def test_element_masks_from_bools_and_from_packed_bits(start: int) -> None:
    rng = np.random.default_rng(start)
    frozen = rng.random(40 * 501) < 0.4
    end = frozen.size - 3
    expected = np.flatnonzero(~frozen[start:end]).tolist()
    packed = np.packbits(frozen, bitorder="little")
    for given in (torch.from_numpy(frozen).view(40, 501), torch.from_numpy(packed), packed):
        mask = ShardMask.from_bits((40, 501), given, start, end)
        assert selected(mask) == expected
        assert mask.numel == len(expected)


def test_index_stays_small() -> None:
    rows, width = 4096, 1024
    chosen = torch.randperm(width)[: width // 2].sort().values
    mask = ShardMask.from_patterns((rows, width), [RowRun(0, rows, 0)], [chosen], 5, rows * width - 5)
    assert mask.nbytes < 8 * width
    runs = [RowRun(r, r + 1, r % 2) for r in range(rows)]
    assert ShardMask.from_patterns((rows, width), runs, [None, columns()], 0, rows * width).nbytes <= 88 * rows
    elements = ShardMask.from_bits((rows, width), torch.rand(rows, width) < 0.5, 0, rows * width)
    assert elements.nbytes * 8 <= 1.02 * rows * width + 256


def test_a_range_behind_two_to_the_31_elements() -> None:
    rows, width = 1 << 21, 1 << 12  # 2^33 elements; the rank owns a little of its end
    start = rows * width - 3 * width - 7
    mask = ShardMask.from_patterns((rows, width), [RowRun(0, rows, 0)], [columns(0, width - 1)], start, rows * width)
    edges = [6, 7, 7 + width - 1, 7 + width, 7 + 2 * width - 1, 7 + 2 * width, 7 + 3 * width - 1]
    assert selected(mask) == edges


def test_offsets_are_64_bit() -> None:
    rows, width = 1 << 20, 1 << 14
    mask = ShardMask.from_patterns((rows, width), [RowRun(0, rows, 0)], [columns(*range(0, width, 2))], 1, rows * width)
    assert mask.numel == rows * width // 2 - 1
    last = mask.host[-1].tolist()
    assert last[kernels.COST] + last[kernels.ROWS] * last[kernels.WIDTH] > 1 << 33


@pytest.mark.parametrize(
    ("shape", "runs", "patterns", "start", "end", "says"),
    [
        ((4, 4), [RowRun(0, 3, 0)], [None], 0, 16, "cover rows 0 to 4"),
        ((4, 4), [RowRun(0, 2, 0), RowRun(3, 4, 0)], [None], 0, 16, "cover rows"),
        ((4, 4), [], [], 0, 16, "cover rows"),
        ((4, 4), [RowRun(0, 4, 0)], [columns(2, 1)], 0, 16, "ascend"),
        ((4, 4), [RowRun(0, 4, 0)], [columns(1, 1)], 0, 16, "ascend"),
        ((4, 4), [RowRun(0, 4, 0)], [columns(4)], 0, 16, "ascend"),
        ((4, 4), [RowRun(0, 4, 0)], [columns(-1, 2)], 0, 16, "ascend"),
        ((4, 4), [RowRun(0, 4, 0)], [None], 0, 17, "not within"),
        ((4, 4), [RowRun(0, 4, 0)], [None], 5, 4, "not within"),
        ((4, 4, 4), [RowRun(0, 4, 0)], [None], 0, 4, "dimensions"),
    ],
)
def test_bad_masks_are_refused(shape, runs, patterns, start, end, says) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=says):
        ShardMask.from_patterns(shape, runs, patterns, start, end)


def test_bad_bits_and_bad_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="bool \\[12\\] or packed uint8 \\[2\\]"):
        ShardMask.from_bits((3, 4), torch.zeros(11, dtype=torch.bool), 0, 12)
    mask = ShardMask.from_bits((3, 4), torch.zeros(12, dtype=torch.bool), 0, 12)
    with pytest.raises(ValueError, match="12 trainable elements among 12"):
        mask.gather(torch.zeros(11), torch.zeros(12))
    with pytest.raises(ValueError, match="float32"):
        mask.gather(torch.zeros(12, dtype=torch.int32), torch.zeros(12))
    with pytest.raises(ValueError, match="contiguous"):
        mask.gather(torch.zeros(24)[::2], torch.zeros(12))
    with pytest.raises(ValueError, match="compact ones float32"):
        mask.scatter(torch.zeros(12, dtype=torch.bfloat16), torch.zeros(12))


def test_to_the_same_device_is_the_same_mask() -> None:
    mask = ShardMask.from_patterns((2, 3), [RowRun(0, 2, 0)], [columns(1)], 0, 6)
    assert mask.to("cpu") is mask
