"""S2FT, structured sparse fine-tuning (Yang et al. 2024, arXiv 2412.06289): a few input channels of the down projections train.

They are drawn over all layers together, so that layers have different numbers of them. Where the original permutes channels to
the front and trains a dense delta there, a column shield leaves them where they are. Weight decay acts on the weights, not on
the delta.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from megatron_ssu.errors import UserError
from megatron_ssu.methods.drawn import DrawnShield, whole
from megatron_ssu.models.matrix import Matrix
from megatron_ssu.shield.budget import check_ratio, units_of_ratio
from megatron_ssu.shield.mask import Mask

if TYPE_CHECKING:
    from megatron_ssu.config.schema import RunConfig
    from megatron_ssu.models.family import Dims


@dataclass(frozen=True)
class SparseOptions:
    """Options of S2FT."""

    down: float = 0.015  # fraction of the down projections' input channels that trains, over all layers
    output: float = 0.0  # fraction of the heads whose input channels of the output projections train
    embeddings: bool = True  # embedding and head train whole, as in the SSU paper's code; the original: false
    seed: int = 42


class SparseFineTuning(DrawnShield):
    """All but a few columns is frozen."""

    name: ClassVar[str] = "s2ft"
    summary: ClassVar[str] = "structured sparse fine-tuning"
    Options: ClassVar[type] = SparseOptions

    def validate(self, run: RunConfig, matrices: Sequence[Matrix]) -> None:
        super().validate(run, matrices)
        for key in ("down", "output"):
            check_ratio(getattr(self.options, key), f"method.s2ft.{key}")
        channels = sum(m.shape[1] for m in matrices if m.kind == "down_proj")
        if units_of_ratio(self.options.down, channels) == 0 and self.options.output == 0:
            raise UserError(
                f"method.s2ft.down: {self.options.down} of {channels} channels is none, so none would train; 0.015 is usual"
            )

    def draw(self, matrices: Sequence[Matrix], dims: Dims) -> dict[str, Mask]:
        """Down projections first, then heads, from one stream of `seed`."""
        options, drawn = self.options, random.Random(self.options.seed)
        free = ("embedding", "head") if options.embeddings else ()
        masks = {matrix.name: whole(matrix) for matrix in matrices if matrix.kind not in free}
        for kind, fraction, width in (("down_proj", options.down, 1), ("o_proj", options.output, dims.head)):
            chosen = [matrix for matrix in matrices if matrix.kind == kind]
            ends = np.cumsum([matrix.shape[1] // width for matrix in chosen])
            total = int(ends[-1])
            open_units = np.zeros(total, dtype=bool)
            open_units[drawn.sample(range(total), units_of_ratio(fraction, total))] = True
            for matrix, units in zip(chosen, np.split(open_units, ends[:-1]), strict=True):
                masks[matrix.name] = Mask.of("column", matrix.shape, ~np.repeat(units, width))
        return masks
