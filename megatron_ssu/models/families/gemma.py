"""Gemma 2 and 3 (text): four norms a layer, stored less 1; scaled embeddings; tanh-GELU; caps (2), norms of q and k (3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_ssu.models.families.parts import (
    EDGES,
    FC1,
    FC2,
    HEAD_NORMS,
    PROJ,
    QKV,
    centred,
    epsilon,
    norm,
    refuse_unless,
)
from megatron_ssu.models.family import Dims, Family, Scales

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec

_LAYER = (
    norm("input_layernorm.weight", "input_layernorm.weight"),
    QKV,
    PROJ,
    norm("self_attention.linear_proj.post_norm.weight", "post_attention_layernorm.weight"),
    norm("pre_mlp_layernorm.weight", "pre_feedforward_layernorm.weight"),
    FC1,
    FC2,
    norm("mlp.linear_fc2.post_norm.weight", "post_feedforward_layernorm.weight"),
)


def _settings(config: Any) -> dict[str, Any]:
    from megatron_ssu.models.activations import tanh_gelu

    return {
        **epsilon(config),
        "layernorm_zero_centered_gamma": True,
        "activation_func": tanh_gelu,
        "qk_layernorm": config.model_type != "gemma2",
    }


def _layer_spec(dims: Dims, transformer_engine: bool, *, head_norms: bool = False) -> ModuleSpec:
    from megatron_ssu.models.layers import with_output_norm
    from megatron_ssu.models.specs import backend, decoder_layer

    parts = backend(transformer_engine)
    return decoder_layer(
        parts,
        input_norm=parts.norm,
        mlp_norm=parts.norm,
        row_linear=with_output_norm(parts.row_linear, parts.norm),
        **({"q_norm": parts.norm, "k_norm": parts.norm} if head_norms else {}),
    )


def _layer_spec_3(dims: Dims, transformer_engine: bool) -> ModuleSpec:
    return _layer_spec(dims, transformer_engine, head_norms=True)


def _scales(config: Any) -> Scales:
    return Scales(
        embedding=config.hidden_size**0.5,
        attention=config.query_pre_attn_scalar**-0.5,
        attention_cap=config.attn_logit_softcapping,
        logit_cap=config.final_logit_softcapping,
    )


def _check(config: Any) -> None:
    refuse_unless(config, "hidden_activation", ("gelu_pytorch_tanh",))
    refuse_unless(config, "attention_bias", (False, None))
    refuse_unless(config, "use_bidirectional_attention", (False, None))


GEMMA2 = Family(
    name="gemma2",
    model_types=("gemma2",),
    layer=centred(_LAYER),
    edges=centred(EDGES),
    settings=_settings,
    layer_spec=_layer_spec,
    check=_check,
    scales=_scales,
)
GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    layer=centred((*_LAYER, *HEAD_NORMS)),
    edges=centred(EDGES),
    settings=_settings,
    layer_spec=_layer_spec_3,
    check=_check,
    scales=_scales,
)
