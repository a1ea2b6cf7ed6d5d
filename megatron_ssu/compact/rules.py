"""Rules of compact parameters that need no tensor: which weights have them, and how they are padded."""

from __future__ import annotations

PINNED_BELOW = 1 / 8  # frozen fraction below which a compact copy costs more than it saves
PAD = 16  # columns, rows and elements: 16-bit rows of a multiple start where fast GEMM kernels and FP8 want them


def is_pinned(dimensions: int, frozen: float) -> bool:
    """Whether a megatron parameter trains as a whole, and its frozen elements are put back after every step.

    A matrix is pinned below `PINNED_BELOW`, a norm whenever some of it trains. Weights that are frozen as a whole, and those
    without a frozen element, are not pinned.

    Args:
        dimensions: of the parameter: 1 (norm) or 2.
        frozen: fraction of its elements, 0 to 1, over all logical matrices in it (q, k and v; gate and up) and all
            tensor-parallel ranks, so that every rank and every mesh decides alike.
    """
    return 0 < frozen < 1 and (dimensions == 1 or frozen < PINNED_BELOW)


def padded(count: int) -> int:
    """`count` rounded up to a multiple of PAD."""
    return -(-count // PAD) * PAD
