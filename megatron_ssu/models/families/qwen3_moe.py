"""Qwen3-MoE: Qwen3's attention, and experts in all layers or in those that config.json says."""

from __future__ import annotations

from typing import Any

from megatron_ssu.models.families.parts import (
    EDGES,
    HEAD_NORMS,
    PRE_NORM_EXPERTS,
    epsilon,
    head_norm_layer,
    plain_experts,
    router_settings,
)
from megatron_ssu.models.family import Family


def _settings(config: Any) -> dict[str, Any]:
    # As for Qwen3: the flag lets megatron sum the gradients of the norms by head over tensor-parallel ranks.
    return {**epsilon(config), **router_settings(config, normalised=config.norm_topk_prob), "qk_layernorm": True}


QWEN3_MOE = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    layer=(*PRE_NORM_EXPERTS, *HEAD_NORMS),
    edges=EDGES,
    settings=_settings,
    layer_spec=head_norm_layer,
    check=lambda config: plain_experts(config, normalised=config.norm_topk_prob),
)
