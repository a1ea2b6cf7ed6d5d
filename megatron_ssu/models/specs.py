"""Which modules a transformer layer is built of: megatron-core's local layers, or Transformer Engine's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_ssu.models.attention import LayerAttention
from megatron_ssu.models.family import Dims, Scales
from megatron_ssu.models.layers import PositionedSelfAttention, RMSNorm, core_attention
from megatron_ssu.models.rope import Rope, needs_tables


@dataclass(frozen=True)
class Backend:
    """The classes that a layer is put together from."""

    norm: type
    column_linear: type
    row_linear: type
    attention: type


def backend(transformer_engine: bool) -> Backend:
    """Norms stay apart from the linear layers after them, so that parameters have one name and scores see true inputs."""
    if transformer_engine:
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        te = TESpecProvider()
        return Backend(
            te.layer_norm(rms_norm=True), te.column_parallel_linear(), te.row_parallel_linear(), te.core_attention()
        )
    local = LocalSpecProvider()
    return Backend(RMSNorm, local.column_parallel_linear(), local.row_parallel_linear(), local.core_attention())


def decoder_layer(
    parts: Backend,
    *,
    input_norm: type = IdentityOp,
    mlp_norm: type = IdentityOp,
    q_norm: ModuleSpec | type = IdentityOp,
    k_norm: ModuleSpec | type = IdentityOp,
    row_linear: type | None = None,
) -> ModuleSpec:
    """A decoder layer: causal self-attention and gated MLP, each with residual; norms where they are given."""
    row = row_linear or parts.row_linear
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=input_norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=parts.column_linear,
                    core_attention=parts.attention,
                    linear_proj=row,
                    q_layernorm=q_norm,
                    k_layernorm=k_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=mlp_norm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=parts.column_linear, linear_fc2=row)),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def layer_specs(spec: ModuleSpec, dims: Dims, ropes: dict[str, Rope], scales: Scales) -> list[ModuleSpec]:
    """The spec of every layer of the model: `spec` with the layer's window, rope, scale, cap and experts."""
    tables = needs_tables(dims, ropes)
    made: dict[tuple[LayerAttention, bool], ModuleSpec] = {}
    attention = dims.attention or (LayerAttention(),) * dims.layers
    kinds = [(layer, dims.sparse(number)) for number, layer in enumerate(attention)]
    for layer, sparse in kinds:
        if (layer, sparse) not in made:
            base = _with_experts(spec) if sparse else spec
            made[layer, sparse] = _layer_spec(base, dims.head, layer, ropes, scales, tables)
    return [made[kind] for kind in kinds]


def _with_experts(spec: ModuleSpec) -> ModuleSpec:
    """The layer with experts, each an MLP of its own, in place of its MLP."""
    mlp: MLPSubmodules = spec.submodules.mlp.submodules
    experts = ModuleSpec(module=SequentialMLP, submodules=mlp)
    moe = ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts))
    return replace(spec, submodules=replace(spec.submodules, mlp=moe))


def _layer_spec(
    spec: ModuleSpec, head: int, layer: LayerAttention, ropes: dict[str, Rope], scales: Scales, tables: bool
) -> ModuleSpec:
    attention: ModuleSpec = spec.submodules.self_attention
    rope = ropes[layer.rope] if layer.rope is not None else None
    grown = rope.factor**2 if rope is not None else 1.0  # of q k^T, in the channels that are turned
    scale, turned = scales.attention, None
    if grown != 1.0 and rope is not None and rope.rotated < head:
        turned = (rope.rotated, grown)
    elif grown != 1.0:
        scale = grown * (head**-0.5 if scale is None else scale)
    parts = attention.submodules
    if layer.window is not None or scale is not None or scales.attention_cap is not None:
        base = parts.core_attention
        if scales.attention_cap is not None:  # Transformer Engine has no cap
            base = LocalSpecProvider().core_attention()
        parts = replace(parts, core_attention=core_attention(base, layer.window, scale, scales.attention_cap))
    changed: dict[str, Any] = {"submodules": parts}
    if tables or turned is not None:
        index = list(ropes).index(layer.rope) if layer.rope is not None else None
        params = {**attention.params, "rope": index, "stacked": tables, "turned": turned}
        changed |= {"module": PositionedSelfAttention, "params": params}
    return replace(spec, submodules=replace(spec.submodules, self_attention=replace(attention, **changed)))
