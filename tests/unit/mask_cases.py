"""Random masks with their naive bool form, for the kernel tests on CPU and GPU."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from megatron_ssu.shield.shards import RowRun, ShardMask

SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -3e-39, 3.4e38, 1.00390625, 1.01171875]


@dataclass(frozen=True)
class Case:
    mask: ShardMask
    trainable: torch.Tensor  # bool [end - start]
    full: torch.Tensor  # [end - start], a view into something larger
    values: torch.Tensor  # float32 [numel]


def random_case(seed: int, dtype: torch.dtype) -> Case:
    """Shapes, runs, patterns, ends and elements all follow from `seed`."""
    rng = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=rng))

    shapes = [(1, pick(1, 90)), (pick(1, 40), 1), (pick(1, 12), pick(1, 40)), (pick(1, 30), pick(60, 400))]
    rows, width = [*shapes, (pick(60, 90), pick(1100, 2300))][pick(0, 4)]
    start = pick(0, rows * width)
    end = pick(start, rows * width)
    if pick(0, 3) == 0:
        start, end = 0, rows * width
    ratio = [0.0, 0.03, 0.5, 0.5, 0.9, 1.0][pick(0, 5)]
    if pick(0, 2) == 0:
        frozen = torch.rand(rows, width, generator=rng) < ratio
        mask = ShardMask.from_bits((rows, width), frozen, start, end)
    else:
        frozen, mask = _patterned(rows, width, start, end, ratio, rng, pick(1, 5))
    surroundings = torch.randn(end - start + 13, generator=rng)
    for at, value in zip(torch.randint(0, surroundings.numel(), (20,), generator=rng), SPECIAL * 2):
        surroundings[at] = value
    values = torch.randn(mask.numel, generator=rng)
    if mask.numel:
        for at, value in zip(torch.randint(0, mask.numel, (20,), generator=rng), SPECIAL * 2):
            values[at] = value
    offset = pick(0, 12)  # the kernels must not count on aligned addresses
    return Case(mask, ~frozen.view(-1)[start:end], surroundings.to(dtype)[offset : offset + end - start], values)


def _patterned(
    rows: int, width: int, start: int, end: int, ratio: float, rng: torch.Generator, pieces: int
) -> tuple[torch.Tensor, ShardMask]:
    cuts = sorted({0, rows, *torch.randint(0, rows + 1, (pieces,), generator=rng).tolist()})
    patterns: list[torch.Tensor | None] = [None, torch.empty(0, dtype=torch.int64)]
    for _ in range(3):
        patterns.append((torch.rand(width, generator=rng) >= ratio).nonzero().view(-1))
    runs = [RowRun(a, b, int(torch.randint(0, 5, (1,), generator=rng))) for a, b in itertools.pairwise(cuts)]
    frozen = torch.ones(rows, width, dtype=torch.bool)
    for run in runs:
        chosen = patterns[run.pattern]
        frozen[run.start : run.stop, slice(None) if chosen is None else chosen] = False
    return frozen, ShardMask.from_patterns((rows, width), runs, patterns, start, end)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, NaN included."""
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
