"""The sizes that config.json must state."""

from __future__ import annotations

from typing import Any

from megatron_ssu.config.coerce import show
from megatron_ssu.errors import UserError


def model_sizes(hf: dict[str, Any], file: str) -> dict[str, int]:
    """The sizes in config.json, which messages call `file`. Raises UserError unless all are whole numbers above 0."""
    names = "num_hidden_layers hidden_size num_attention_heads num_key_value_heads intermediate_size vocab_size"
    sizes = {}
    for name in (*names.split(), "max_position_embeddings"):
        value = hf.get(name)
        if name == "num_key_value_heads" and value is None:
            value = hf.get("num_attention_heads")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            shown = "missing" if name not in hf else f"{show(value)}, not a whole number above 0"
            raise UserError(f"{file}: {name} is {shown}; copy the file again")
        sizes[name] = value
    for large, small in (("num_attention_heads", "num_key_value_heads"), ("hidden_size", "num_attention_heads")):
        if sizes[large] % sizes[small] and not (large == "hidden_size" and hf.get("head_dim")):
            raise UserError(f"{file}: {small} {sizes[small]} does not divide {large} {sizes[large]}")
    return sizes
