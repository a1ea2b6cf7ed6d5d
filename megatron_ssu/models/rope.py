"""Rotary embeddings: the tables of a config.json, computed by transformers, and the module that hands them to the layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ssu.errors import UserError
from megatron_ssu.models.attention import FULL, LayerAttention, has_nested_ropes
from megatron_ssu.models.family import Dims
from megatron_ssu.models.hf_config import normalised
from megatron_ssu.models.rope_settings import check_rope


@dataclass(frozen=True, eq=False)
class Rope:
    """One rotary embedding of a model."""

    frequencies: torch.Tensor  # inverse frequencies fp32 [rotated channels / 2]
    factor: float = 1.0  # of cos and sin, so that scores are scaled by its square
    long: torch.Tensor | None = None  # longrope: the frequencies of rows with more than `switch` tokens
    switch: int = 0

    @property
    def rotated(self) -> int:
        """Channels of a head that are turned, from the first on."""
        return 2 * len(self.frequencies)


def ropes(hf: dict[str, Any], path: str) -> dict[str, Rope]:
    """The model's ropes by the type of layer that uses them; one, for all, is under `full_attention`.

    Raises:
        UserError: settings that are incomplete or not numbers, or a rope of another type.
    """
    file = f"{path}/config.json"
    check_rope(hf, file)
    config = normalised(hf)
    kinds: list[str | None] = [*config.rope_parameters] if has_nested_ropes(config) else [None]
    found = {}
    for kind in kinds:
        try:
            rope = _rope(config, kind)
        except Exception as error:  # transformers raises many kinds for settings that it does not expect
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(f"{file}: the rope settings cannot be used ({reason}); copy the file again") from error
        if not bool(torch.isfinite(rope.frequencies).all()):
            raise UserError(f"{file}: the rope settings give frequencies that are not finite; copy the file again")
        found[kind or FULL] = rope
    return found


def _rope(config: Any, kind: str | None) -> Rope:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = config.rope_parameters if kind is None else config.rope_parameters[kind]
    rope_type = settings.get("rope_type", "default")
    if rope_type == "default":
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        channels = int(head * settings.get("partial_rotary_factor", 1.0))
        steps = torch.arange(0, channels, 2, dtype=torch.int64).to(torch.float32) / channels
        return Rope(1.0 / (settings["rope_theta"] ** steps))
    layer = {} if kind is None else {"layer_type": kind}

    def computed(length: int | None) -> tuple[torch.Tensor, float]:
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=length, **layer)
        return frequencies.float(), float(factor)

    if rope_type != "longrope":
        return Rope(*computed(None))
    switch = int(settings.get("original_max_position_embeddings") or config.original_max_position_embeddings)
    (short, factor), (long, _) = computed(switch), computed(switch + 1)
    return Rope(short, factor, long, switch)


def needs_tables(dims: Dims, found: dict[str, Rope]) -> bool:
    """Whether layers choose between ropes, or a rope between frequencies, so that one table is not enough."""
    layers = dims.attention or (LayerAttention(),)
    return len({layer.rope for layer in layers}) > 1 or any(rope.long is not None for rope in found.values())


class RopeTables(torch.nn.Module):
    """In place of a GPTModel's rotary embedding: the tables of several ropes, [ropes, s, 1, 1, d], of which each layer takes
    one (layers.PositionedSelfAttention)."""

    def __init__(self, rotary: torch.nn.Module, found: Sequence[Rope]) -> None:
        """`rotary` is megatron's own, which makes a table out of frequencies."""
        super().__init__()
        self.get_rotary_seq_len = rotary.get_rotary_seq_len
        self._switches = [rope.switch if rope.long is not None else None for rope in found]
        self._short = [_with(rotary, rope.frequencies) for rope in found]
        self._long = [_with(rotary, rope.frequencies if rope.long is None else rope.long) for rope in found]

    def forward(self, length: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`length`: tokens of a row."""
        chosen = [
            long if switch is not None and length > switch else short
            for short, long, switch in zip(self._short, self._long, self._switches, strict=True)
        ]
        return torch.stack([rotary(length, *args, **kwargs) for rotary in chosen])


def _with(rotary: Any, frequencies: torch.Tensor) -> Any:
    found = copy.copy(rotary)
    found.inv_freq = frequencies.to(rotary.inv_freq.device)
    return found
