"""Which weights a rule of shield.protect fits."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_ssu.errors import UserError
from megatron_ssu.models.matrix import ATTENTION_KINDS, MLP_KINDS, Matrix

SELECTORS: dict[str, tuple[str, ...]] = {
    "embeddings": ("embedding",),
    "head": ("head",),
    "norms": ("norm", "centred_norm"),
    "biases": ("bias",),
    "attention": ATTENTION_KINDS,
    "mlp": MLP_KINDS,
}


@dataclass(frozen=True)
class ProtectRule:
    """Weights that are always frozen or always trainable, whatever their scores.

    `pattern`: embeddings, head, norms, biases, attention, mlp, layers:3, layers:0-3, or a file-name pattern over tensor names.
    """

    pattern: str
    action: Literal["frozen", "trainable"]


def protected(matrices: Mapping[str, Matrix], rules: Sequence[ProtectRule]) -> dict[str, str]:
    """Matrix name -> 'frozen' or 'trainable', by the last rule that fits it; UserError for a rule that fits nothing."""
    result: dict[str, str] = {}
    for rule in rules:
        names = select(matrices, rule.pattern)
        result.update(dict.fromkeys(names, rule.action))
    return dict(sorted(result.items()))


def select(matrices: Mapping[str, Matrix], pattern: str) -> list[str]:
    """Names that a selector fits (see ProtectRule). UserError when there are none."""
    if pattern in SELECTORS:
        names = [n for n, m in matrices.items() if m.kind in SELECTORS[pattern]]
    elif pattern.startswith("layers:"):
        first, _, last = pattern.removeprefix("layers:").partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise UserError(
                f"shield.protect: must be a range of layers such as layers:3 or layers:0-3, got {pattern!r}"
            )
        low, high = int(first), int(last or first)
        layers = [m.layer for m in matrices.values() if m.layer is not None]
        if not layers or low > high or high > max(layers):
            raise UserError(
                f"shield.protect: {pattern!r} reaches outside layers 0-{max(layers, default=0)} of the model"
            )
        names = [n for n, m in matrices.items() if m.layer is not None and low <= m.layer <= high]
    else:
        names = [n for n in matrices if fnmatch.fnmatchcase(n, pattern)]
    if not names:
        hint = f"use {', '.join(SELECTORS)}, layers:0-3 or a pattern such as *.o_proj.weight"
        raise UserError(f"shield.protect: {pattern!r} fits no weight of the model; {hint}")
    return names
