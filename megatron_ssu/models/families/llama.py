"""Llama 2 and 3: norms before attention and MLP (pre-norm)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_ssu.models.family import EDGES, FC1, FC2, PROJ, QKV, Dims, Family, norm, refuse_unless

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


def _settings(hf: dict[str, Any], dims: Dims) -> dict[str, Any]:
    return {"layernorm_epsilon": hf.get("rms_norm_eps", 1e-6)}


def _layer_spec(dims: Dims, transformer_engine: bool) -> ModuleSpec:
    from megatron_ssu.models.specs import backend, decoder_layer

    parts = backend(transformer_engine)
    return decoder_layer(parts, input_norm=parts.norm, mlp_norm=parts.norm)


def _check(hf: dict[str, Any]) -> None:
    refuse_unless(hf, "hidden_act", ("silu",))
    refuse_unless(hf, "attention_bias", (False, None))
    refuse_unless(hf, "mlp_bias", (False, None))


LLAMA = Family(
    name="llama",
    model_types=("llama",),
    layer=(
        norm("input_layernorm.weight", "input_layernorm.weight"),
        QKV,
        PROJ,
        norm("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
        FC1,
        FC2,
    ),
    edges=EDGES,
    settings=_settings,
    layer_spec=_layer_spec,
    check=_check,
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
