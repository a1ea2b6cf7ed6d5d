"""OLMoE: norms before attention and experts, q and k normed over their whole projections, experts in all layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_ssu.models.families.parts import (
    EDGES,
    PRE_NORM_EXPERTS,
    PROJECTION_NORMS,
    epsilon,
    plain_experts,
    projection_norms,
    refuse_unless,
    router_settings,
)
from megatron_ssu.models.family import Dims, Family

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


def _layer_spec(dims: Dims, transformer_engine: bool) -> ModuleSpec:
    from megatron_ssu.models.specs import backend, decoder_layer

    parts = backend(transformer_engine)
    return decoder_layer(parts, input_norm=parts.norm, mlp_norm=parts.norm, **projection_norms(dims))


def _check(config: Any) -> None:
    plain_experts(config, normalised=config.norm_topk_prob)
    refuse_unless(config, "clip_qkv", (None,))


OLMOE = Family(
    name="olmoe",
    model_types=("olmoe",),
    layer=(*(e for e in PRE_NORM_EXPERTS if e.only != "dense"), *PROJECTION_NORMS),
    edges=EDGES,
    settings=lambda config: {**epsilon(config), **router_settings(config, normalised=config.norm_topk_prob)},
    layer_spec=_layer_spec,
    check=_check,
)
