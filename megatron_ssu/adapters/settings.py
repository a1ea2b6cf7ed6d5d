"""What an adapter is: sizes and kinds, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_ssu.models.matrix import ATTENTION_KINDS, MLP_KINDS

TARGETS = (*ATTENTION_KINDS, *MLP_KINDS)


@dataclass(frozen=True)
class AdapterSettings:
    """W' = W + scale B A for every matrix W [O, I] of the kinds in `targets`; A [rank, I], B [O, rank].

    LoRA: arXiv 2106.09685; with `rslora` its scale is that of arXiv 2312.03732; with `dora` W' is that of arXiv 2402.09353,
    W' = m (W + scale B A) / norm, row by row, where norm [O] is the L2 norm of the rows of W + scale B A, a constant in the
    backward pass, and m [O] is trained from the row norms of W.
    """

    rank: int = 32
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS
    dora: bool = False
    rslora: bool = False
    seed: int = 1234  # of A's random start

    @property
    def scale(self) -> float:
        """alpha / rank; with `rslora` alpha / sqrt(rank)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
