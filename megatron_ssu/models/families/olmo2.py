"""OLMo-2 and Olmo-3: norms after attention and MLP, q and k normed over their whole projections; Olmo-3 with windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_ssu.models.families.parts import (
    EDGES,
    FC1,
    FC2,
    PROJ,
    PROJECTION_NORMS,
    QKV,
    epsilon,
    norm,
    plain_mlp,
    projection_norms,
)
from megatron_ssu.models.family import Dims, Family

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


def _layer_spec(dims: Dims, transformer_engine: bool) -> ModuleSpec:
    from megatron_ssu.models.layers import with_output_norm
    from megatron_ssu.models.specs import backend, decoder_layer

    parts = backend(transformer_engine)
    return decoder_layer(parts, row_linear=with_output_norm(parts.row_linear, parts.norm), **projection_norms(dims))


OLMO2 = Family(
    name="olmo2",
    model_types=("olmo2", "olmo3"),
    layer=(
        QKV,
        *PROJECTION_NORMS,
        PROJ,
        norm("self_attention.linear_proj.post_norm.weight", "post_attention_layernorm.weight"),
        FC1,
        FC2,
        norm("mlp.linear_fc2.post_norm.weight", "post_feedforward_layernorm.weight"),
    ),
    edges=EDGES,
    settings=epsilon,
    layer_spec=_layer_spec,
    check=plain_mlp,
)
