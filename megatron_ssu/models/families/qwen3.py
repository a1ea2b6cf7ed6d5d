"""Qwen3: Llama's layers with norms of q and k by head."""

from __future__ import annotations

from typing import Any

from megatron_ssu.models.families.parts import EDGES, HEAD_NORMS, PRE_NORM, epsilon, head_norm_layer, plain_mlp
from megatron_ssu.models.family import Family


def _settings(config: Any) -> dict[str, Any]:
    # The flag lets megatron sum the gradients of these norms over tensor-parallel ranks, each of which has its own heads.
    return {**epsilon(config), "qk_layernorm": True}


QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    layer=(*PRE_NORM, *HEAD_NORMS),
    edges=EDGES,
    settings=_settings,
    layer_spec=head_norm_layer,
    check=plain_mlp,
)
