"""Random masks with their naive form, for the kernel tests on CPU and GPU."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from megatron_ssu.compact.shards import RowRun, ShardMask
from megatron_ssu.ops import kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    mask: ShardMask
    places: torch.Tensor  # int64 [numel]: of the trainable elements in the shard, ascending
    slots: torch.Tensor  # int64 [numel]: of the same in the compact tensor
    full: torch.Tensor  # [R * C], a view into something larger
    values: torch.Tensor  # [size], of the same dtype


def random_case(seed: int, dtype: torch.dtype) -> Case:
    """Shape, runs, patterns, padding and the bits of all elements follow from `seed`."""
    rng = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=rng))

    shapes = [(1, pick(1, 90)), (pick(1, 40), 1), (pick(1, 12), pick(1, 40)), (pick(1, 30), pick(60, 400))]
    rows, width = [*shapes, (pick(60, 90), pick(1100, 2300))][pick(0, 4)]
    ratio = [0.0, 0.03, 0.5, 0.5, 0.9, 1.0][pick(0, 5)]
    if pick(0, 2) == 0:
        frozen = torch.rand(rows, width, generator=rng) < ratio
        mask = ShardMask.from_bits((rows, width), frozen)
        places = (~frozen).view(-1).nonzero().view(-1)
        slots = torch.arange(places.numel())
    else:
        mask, places, slots = _patterned(
            rows, width, ratio, rng, pick(1, 5), [0, 0, width + 3, (width + 15) // 16 * 16][pick(0, 3)]
        )
    offset = pick(0, 12)  # the kernels must not count on aligned addresses
    full = random_bits(rows * width + 13, dtype, rng)[offset : offset + rows * width]
    return Case(mask, places, slots, full, random_bits(mask.size, dtype, rng))


def _patterned(
    rows: int, width: int, ratio: float, rng: torch.Generator, pieces: int, stride: int
) -> tuple[ShardMask, torch.Tensor, torch.Tensor]:
    cuts = sorted({0, rows, *torch.randint(0, rows + 1, (pieces,), generator=rng).tolist()})
    patterns: list[torch.Tensor | None] = [None, torch.empty(0, dtype=torch.int64)]
    for _ in range(3):
        patterns.append((torch.rand(width, generator=rng) >= ratio).nonzero().view(-1))
    runs = [RowRun(a, b, int(torch.randint(0, 5, (1,), generator=rng))) for a, b in itertools.pairwise(cuts)]
    places, slots, size = [], [], 0
    for row, pattern in ((r, patterns[run.pattern]) for run in runs for r in range(run.start, run.stop)):
        columns = torch.arange(width) if pattern is None else pattern
        places.append(row * width + columns)
        slots.append(size + torch.arange(columns.numel()))
        listed = pattern is not None and columns.numel() > 0
        size += stride if stride and listed else columns.numel()
    mask = ShardMask.from_patterns((rows, width), runs, patterns, stride)
    assert mask.size == size
    return mask, torch.cat(places), torch.cat(slots)


def random_bits(count: int, dtype: torch.dtype, rng: torch.Generator | None = None) -> torch.Tensor:
    """[count] of any bits at all: NaN with payloads, infinities and denormals among them."""
    return torch.randint(-128, 128, (count * dtype.itemsize,), dtype=torch.int8, generator=rng).view(dtype)


def bits(a: torch.Tensor) -> torch.Tensor:
    """The same elements as integers."""
    return a.view({2: torch.int16, 4: torch.int32}[a.element_size()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, NaN included."""
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def gathered(case: Case) -> torch.Tensor:
    """The compact tensor with zeros for padding, by plain indexing."""
    out = torch.zeros(case.mask.size, dtype=case.full.dtype)
    bits(out)[case.slots] = bits(case.full)[case.places]
    return out


def scattered(case: Case) -> torch.Tensor:
    """The shard once the values are in it, by plain indexing."""
    full = case.full.clone()
    bits(full)[case.places] = bits(case.values)[case.slots]
    return full


def by_torch(gather: kernels.ColumnGather, x: torch.Tensor) -> torch.Tensor:
    """What a gather makes of x [T, inputs] without the extension."""
    out = x.new_empty(x.shape[0], gather.width)
    gather._torch(x, out)
    return out


def by_extension(gathers: list[kernels.ColumnGather], x: torch.Tensor, level: int) -> list[torch.Tensor]:
    """What gathers make of x [T, inputs] at a level of the C++ kernels."""
    found = [x.new_empty(x.shape[0], gather.width) for gather in gathers]
    kernels._extension_columns(gathers, x, found, level)
    return found
