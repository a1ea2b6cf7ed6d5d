"""What every part of the project knows of a weight: its Hugging Face name, shape, layer and kind."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

ATTENTION_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_KINDS = ("gate_proj", "up_proj", "down_proj")
OTHER_KINDS = ("embedding", "head", "norm", "centred_norm", "bias", "router")
KINDS = (*ATTENTION_KINDS, *MLP_KINDS, *OTHER_KINDS)


@dataclass(frozen=True)
class Matrix:
    """A logical weight of the model."""

    name: str  # tensor name in the Hugging Face directory
    shape: tuple[int, ...]  # [O, I]; [n] for norms and biases
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
    def is_norm(self) -> bool:
        """Whether it is a norm's weight; a centred one is stored less 1."""
        return self.kind in ("norm", "centred_norm")

    @property
    def scored(self) -> bool:
        """Whether it is one of the seven linear weights of a layer, over which a budget is spent."""
        return self.kind in ATTENTION_KINDS or self.kind in MLP_KINDS


def of_experts(name: str) -> str:
    """A matrix's name with `*` for its expert's number: the same for all experts of a layer."""
    return re.sub(r"\.experts\.\d+\.", ".experts.*.", name)


def matrices_to_json(matrices: Mapping[str, Matrix]) -> dict[str, dict[str, Any]]:
    """Header form of a list of matrices."""
    result = {}
    for name, matrix in matrices.items():
        result[name] = {key: value for key, value in asdict(matrix).items() if key != "name"}
        result[name]["shape"] = list(matrix.shape)
    return result


def matrices_from_json(value: Mapping[str, Mapping[str, Any]]) -> dict[str, Matrix]:
    """The inverse of `matrices_to_json`, sorted by name; further keys are left alone."""
    return {name: Matrix(name, tuple(m["shape"]), m["layer"], m["kind"]) for name, m in sorted(value.items())}
