"""The k-th largest magnitude, against sorting."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_ssu.ops.order import kth_largest_bits, magnitude_bits


@pytest.fixture(scope="module", autouse=True)
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def drawn(size):
    draw = torch.Generator().manual_seed(size)
    few = torch.randint(-3, 3, (size,), generator=draw).float()
    normal = torch.randn(size, generator=draw)
    return [normal, normal * 1e-38, normal * 1e38, few, torch.zeros(size), -normal.bfloat16().float()]


@pytest.mark.parametrize("size", [1, 2, 31, 5000])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 1.0])
def test_thresholds_are_those_of_sorting(size, fraction):
    sets, count = [magnitude_bits(values) for values in drawn(size)], max(1, int(fraction * size))
    found = kth_largest_bits([lambda part=part: part for part in sets], [count] * len(sets), None, torch.device("cpu"))
    assert found.tolist() == [part.sort(descending=True).values[count - 1].item() for part in sets]


def test_what_is_not_finite_is_largest():
    values = torch.tensor([1.0, float("nan"), -float("inf"), 2.0])
    found = [
        kth_largest_bits([lambda: magnitude_bits(values)], [k], None, torch.device("cpu")).item() for k in (1, 2, 3)
    ]
    assert found == [magnitude_bits(values[i : i + 1]).item() for i in (1, 2, 3)]
