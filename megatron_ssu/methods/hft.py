"""Half fine-tuning (Hui et al. 2024, arXiv 2404.18466): half of each layer's matrices are frozen, drawn once.

As the SSU paper's code has it for ratio 0.5: two of four attention matrices in every layer, two of three MLP matrices in half
of the layers and one in the others, half of the layer's norms. Embedding and head train, but for the special tokens' rows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megatron_ssu.methods.drawn import DrawnShield, whole
from megatron_ssu.methods.planned import special_token_masks
from megatron_ssu.models.matrix import ATTENTION_KINDS, MLP_KINDS, Matrix
from megatron_ssu.shield.budget import check_ratio, units_of_ratio
from megatron_ssu.shield.mask import Mask

if TYPE_CHECKING:
    from megatron_ssu.config.schema import RunConfig
    from megatron_ssu.models.family import Dims
    from megatron_ssu.models.source import Source


@dataclass(frozen=True)
class HalfOptions:
    """Options of HFT."""

    ratio: float = 0.5  # fraction of the matrices of each group (attention, MLP, norms) that is frozen
    norms: bool = True  # freeze norms of the layers too
    special_tokens: bool = True  # freeze the chat template's special-token rows of embedding and head
    seed: int = 42


class HalfFineTuning(DrawnShield):
    """Whole matrices, drawn by layer."""

    name: ClassVar[str] = "hft"
    summary: ClassVar[str] = "half fine-tuning"
    Options: ClassVar[type] = HalfOptions

    def validate(self, run: RunConfig, matrices: Sequence[Matrix]) -> None:
        super().validate(run, matrices)
        check_ratio(self.options.ratio, "method.hft.ratio")

    def draw(self, matrices: Sequence[Matrix], dims: Dims) -> dict[str, Mask]:
        """floor(ratio * n) of the n matrices of each group over all layers, of each layer as many as of the others, give or
        take one, or as large a part where some have experts."""
        options, frozen = self.options, []
        drawn = random.Random(options.seed)
        for kinds in (ATTENTION_KINDS, MLP_KINDS, ("norm",) if options.norms else ()):
            layers = [
                [m for m in matrices if m.layer == i and m.kind.removeprefix("centred_") in kinds]
                for i in range(dims.layers)
            ]
            each = [units_of_ratio(options.ratio, len(group)) for group in layers]
            left = units_of_ratio(options.ratio, sum(map(len, layers))) - sum(each)
            more = set(drawn.sample(range(dims.layers), left))
            for number, group in enumerate(layers):
                frozen += drawn.sample(group, each[number] + (number in more))
        return {matrix.name: whole(matrix) for matrix in frozen}

    def masks(self, run: RunConfig, source: Source) -> dict[str, Mask]:
        rows = special_token_masks(run, source) if self.options.special_tokens else {}
        return super().masks(run, source) | rows
