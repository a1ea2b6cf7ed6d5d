"""What attention looks at in each layer, out of a config that transformers has normalised: windows and ropes."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from megatron_ssu.errors import UserError

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class LayerAttention:
    """How one layer attends."""

    window: int | None = None  # tokens that a token sees, itself among them; None: all up to itself
    rope: str | None = FULL  # which of the model's ropes turns q and k (`rope.ropes`); None: none does


def layer_attention(config: Any) -> tuple[LayerAttention, ...]:
    """Of every layer, in order; `config` is transformers' own.

    Raises UserError for a kind of layer that is neither full nor sliding attention, and for lists of another length.
    """
    types = _types(config)
    nested = has_nested_ropes(config)
    positions = declared(config, "no_rope_layers") or [1] * len(types)  # 1: with rope
    if len(positions) != len(types):
        raise UserError(f"config.json: no_rope_layers must have {len(types)} numbers, got {len(positions)}")
    return tuple(
        LayerAttention(
            window=config.sliding_window if kind == SLIDING else None,
            rope=(kind if nested else FULL) if turned else None,
        )
        for kind, turned in zip(types, positions, strict=True)
    )


def _types(config: Any) -> list[str]:
    """`full_attention` or `sliding_attention` for every layer."""
    layers, window = config.num_hidden_layers, declared(config, "sliding_window")
    types = declared(config, "layer_types") or [FULL if window is None else SLIDING] * layers
    for kind in types:
        if kind not in (FULL, SLIDING):
            raise UserError(f"config.json: layer_types: {kind!r} is not supported; it must be {FULL} or {SLIDING}")
    if len(types) != layers:
        raise UserError(f"config.json: layer_types must have {layers} names (num_hidden_layers), got {len(types)}")
    if SLIDING in types and (not isinstance(window, int) or window < 1):
        raise UserError(f"config.json: sliding_window must be a whole number above 0, got {window!r}")
    return list(types)


def declared(config: Any, key: str) -> Any:
    """A key of config.json that transformers' model of this type knows: others it keeps as attributes and does not look at."""
    known = hasattr(type(config), key) or key in inspect.signature(type(config).__init__).parameters
    return getattr(config, key, None) if known else None


def has_nested_ropes(config: Any) -> bool:
    """Whether each type of layer has a rope of its own."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return bool(parameters) and all(isinstance(value, dict) for value in parameters.values())
