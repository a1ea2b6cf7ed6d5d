"""OLMo-2 and Olmo-3: norms after attention and MLP, q and k normed over their whole projections; Olmo-3 with windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_ssu.models.families.parts import EDGES, FC1, FC2, PROJ, QKV, epsilon, norm, plain_mlp
from megatron_ssu.models.family import Dims, Entry, Family

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


def _layer_spec(dims: Dims, transformer_engine: bool) -> ModuleSpec:
    from megatron.core.transformer.spec_utils import ModuleSpec

    from megatron_ssu.models.layers import ProjectionRMSNorm, with_output_norm
    from megatron_ssu.models.specs import backend, decoder_layer

    parts = backend(transformer_engine)
    return decoder_layer(
        parts,
        q_norm=ModuleSpec(module=ProjectionRMSNorm, params={"heads": dims.heads}),
        k_norm=ModuleSpec(module=ProjectionRMSNorm, params={"heads": dims.groups}),
        row_linear=with_output_norm(parts.row_linear, parts.norm),
    )


OLMO2 = Family(
    name="olmo2",
    model_types=("olmo2", "olmo3"),
    layer=(
        QKV,
        Entry(
            "self_attention.q_layernorm.weight", ("model.layers.{layer}.self_attn.q_norm.weight",), ("q_norm",), split=0
        ),
        Entry(
            "self_attention.k_layernorm.weight", ("model.layers.{layer}.self_attn.k_norm.weight",), ("k_norm",), split=0
        ),
        PROJ,
        norm("self_attention.linear_proj.post_norm.weight", "post_attention_layernorm.weight"),
        FC1,
        FC2,
        norm("mlp.linear_fc2.post_norm.weight", "post_feedforward_layernorm.weight"),
    ),
    edges=EDGES,
    # megatron's qk_layernorm stays off: it would sum the q/k norm gradients over tensor-parallel ranks.
    settings=epsilon,
    layer_spec=_layer_spec,
    check=plain_mlp,
)
