"""Qwen2 and Qwen2.5: Llama's layers with biases of q, k and v."""

from __future__ import annotations

from typing import Any

from megatron_ssu.models.families.parts import EDGES, PRE_NORM, QKV_BIAS, epsilon, plain_mlp, pre_norm_layer
from megatron_ssu.models.family import Family


def _settings(config: Any) -> dict[str, Any]:
    return {**epsilon(config), "add_qkv_bias": True}


QWEN2 = Family(
    name="qwen2",
    model_types=("qwen2",),
    layer=(*PRE_NORM, QKV_BIAS),
    edges=EDGES,
    settings=_settings,
    layer_spec=pre_norm_layer,
    check=plain_mlp,
)
