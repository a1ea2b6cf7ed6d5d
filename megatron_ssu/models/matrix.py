"""What every part of the project knows of a weight: its Hugging Face name, shape, layer and kind."""

from __future__ import annotations

from dataclasses import dataclass

ATTENTION_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_KINDS = ("gate_proj", "up_proj", "down_proj")
OTHER_KINDS = ("embedding", "head", "norm")
KINDS = (*ATTENTION_KINDS, *MLP_KINDS, *OTHER_KINDS)


@dataclass(frozen=True)
class Matrix:
    """A logical weight of the model."""

    name: str  # tensor name in the Hugging Face directory
    shape: tuple[int, ...]  # [O, I]; [H] for norms
    layer: int | None  # None outside the layers
    kind: str  # one of KINDS

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def scored(self) -> bool:
        """Is it one of the seven linear weights of a layer, over which a budget is spent?"""
        return self.kind in ATTENTION_KINDS or self.kind in MLP_KINDS
