"""The k-th largest magnitude of values that many ranks hold: exact, by counting bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_DIGITS = ((20, 11), (10, 10), (0, 10))  # of the 31 bits of a magnitude: (lowest bit, bits), highest digits first


def magnitude_bits(values: Tensor) -> Tensor:
    """int32, like `values`: the bits of |values| in fp32, which are ordered as the magnitudes are; NaN is the largest."""
    return values.float().view(torch.int32) & 0x7FFFFFFF


def kth_largest_bits(
    values: Sequence[Callable[[], Tensor]], counts: Sequence[int], group: dist.ProcessGroup | None, device: torch.device
) -> Tensor:
    """int32 [n]: the bits of the counts[i]-th largest magnitude of set i. Collective over `group`.

    Args:
        values: per set a function that gives this rank's part of it, int32 [any] of `magnitude_bits`; asked three times.
        counts: from 1 to the size of the set over all ranks.
    """
    left = torch.tensor(counts, dtype=torch.int64, device=device)
    prefix = torch.zeros(len(counts), dtype=torch.int32, device=device)
    for shift, width in _DIGITS:
        histogram = torch.stack([_digits(part(), int(prefix[i]), shift, width) for i, part in enumerate(values)])
        dist.all_reduce(histogram, group=group)
        above = histogram.flip(1).cumsum(1)  # how many have at least this digit, largest first
        digit = (above < left[:, None]).sum(1)
        left -= above.gather(1, (digit - 1).clamp(min=0)[:, None])[:, 0] * (digit > 0)
        prefix |= (((1 << width) - 1 - digit) << shift).int()
    return prefix


def _digits(bits: Tensor, prefix: int, shift: int, width: int) -> Tensor:
    """int64 [2^width]: how often each digit follows `prefix`, which stands above it."""
    matching = bits[(bits >> (shift + width)) == prefix >> (shift + width)]
    return torch.bincount((matching >> shift) & ((1 << width) - 1), minlength=1 << width)
