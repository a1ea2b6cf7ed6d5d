"""What several families share: entries of their tables, layers, settings and checks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_ssu.errors import UserError
from megatron_ssu.models.experts import experts_of
from megatron_ssu.models.family import Dims, Entry

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec

_L = "model.layers.{layer}."

# What most families name alike.
QKV = Entry(
    "self_attention.linear_qkv.weight",
    (_L + "self_attn.q_proj.weight", _L + "self_attn.k_proj.weight", _L + "self_attn.v_proj.weight"),
    ("q_proj", "k_proj", "v_proj"),
    split=0,
    form="qkv",
)
PROJ = Entry("self_attention.linear_proj.weight", (_L + "self_attn.o_proj.weight",), ("o_proj",), split=1)
FC1 = Entry(
    "mlp.linear_fc1.weight",
    (_L + "mlp.gate_proj.weight", _L + "mlp.up_proj.weight"),
    ("gate_proj", "up_proj"),
    split=0,
    form="gated",
)
FC2 = Entry("mlp.linear_fc2.weight", (_L + "mlp.down_proj.weight",), ("down_proj",), split=1)
ROUTER = Entry("mlp.router.weight", (_L + "mlp.gate.weight",), ("router",), only="sparse")
EXPERTS = (
    Entry(
        "mlp.experts.local_experts.{expert}.linear_fc1.weight",
        (_L + "mlp.experts.{expert}.gate_proj.weight", _L + "mlp.experts.{expert}.up_proj.weight"),
        ("expert_gate_proj", "expert_up_proj"),
        form="gated",
        only="sparse",
    ),
    Entry(
        "mlp.experts.local_experts.{expert}.linear_fc2.weight",
        (_L + "mlp.experts.{expert}.down_proj.weight",),
        ("expert_down_proj",),
        only="sparse",
    ),
)
EDGES = (
    Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ("embedding",), split=0, form="vocab"),
    Entry("decoder.final_layernorm.weight", ("model.norm.weight",), ("norm",)),
    Entry("output_layer.weight", ("lm_head.weight",), ("head",), split=0, form="vocab"),
)


QKV_BIAS = Entry(
    "self_attention.linear_qkv.bias",
    (_L + "self_attn.q_proj.bias", _L + "self_attn.k_proj.bias", _L + "self_attn.v_proj.bias"),
    ("q_bias", "k_bias", "v_bias"),
    split=0,
    form="qkv",
)
# Norms of q and k, one for all heads.
HEAD_NORMS = (
    Entry("self_attention.q_layernorm.weight", (_L + "self_attn.q_norm.weight",), ("head_norm",)),
    Entry("self_attention.k_layernorm.weight", (_L + "self_attn.k_norm.weight",), ("head_norm",)),
)
# The same, over whole projections.
PROJECTION_NORMS = (
    Entry("self_attention.q_layernorm.weight", (_L + "self_attn.q_norm.weight",), ("q_norm",), split=0),
    Entry("self_attention.k_layernorm.weight", (_L + "self_attn.k_norm.weight",), ("k_norm",), split=0),
)


def norm(param: str, tensor: str, kind: str = "norm") -> Entry:
    """A norm of a layer, as wide as the hidden size, the same on all tensor-parallel ranks."""
    return Entry(param, (_L + tensor,), (kind,))


def centred(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """The entries with norms that are stored less 1."""
    return tuple(
        replace(e, kinds=tuple(f"centred_{kind}" if kind.endswith("norm") else kind for kind in e.kinds))
        for e in entries
    )


_PRE_NORM = (
    norm("input_layernorm.weight", "input_layernorm.weight"),
    QKV,
    PROJ,
    norm("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
)
PRE_NORM = (*_PRE_NORM, FC1, FC2)
# With experts in some or all layers.
PRE_NORM_EXPERTS = (*_PRE_NORM, replace(FC1, only="dense"), replace(FC2, only="dense"), ROUTER, *EXPERTS)
ROPE_BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


def pre_norm_layer(dims: Dims, transformer_engine: bool) -> ModuleSpec:
    """A layer with norms before attention and MLP."""
    from megatron_ssu.models.specs import backend, decoder_layer

    parts = backend(transformer_engine)
    return decoder_layer(parts, input_norm=parts.norm, mlp_norm=parts.norm)


def head_norm_layer(dims: Dims, transformer_engine: bool) -> ModuleSpec:
    """The same, with norms of q and k by head."""
    from megatron_ssu.models.specs import backend, decoder_layer

    parts = backend(transformer_engine)
    return decoder_layer(parts, input_norm=parts.norm, mlp_norm=parts.norm, q_norm=parts.norm, k_norm=parts.norm)


def projection_norms(dims: Dims) -> dict[str, ModuleSpec]:
    """Norms of q and k over their whole projections, for `decoder_layer`.

    megatron's setting qk_layernorm stays off with them: it would sum their gradients over tensor-parallel ranks.
    """
    from megatron.core.transformer.spec_utils import ModuleSpec

    from megatron_ssu.models.layers import ProjectionRMSNorm

    heads = {"q_norm": dims.heads, "k_norm": dims.groups}
    return {name: ModuleSpec(module=ProjectionRMSNorm, params={"heads": count}) for name, count in heads.items()}


def epsilon(config: Any) -> dict[str, Any]:
    """The setting that all families have: the norms' epsilon."""
    return {"layernorm_epsilon": config.rms_norm_eps}


def router_settings(config: Any, *, normalised: bool) -> dict[str, Any]:
    """Settings of layers with experts; `normalised`: the weights of a token's experts add up to 1.

    Experts are modules of their own, whose weights are shielded each for itself. No loss balances the experts: transformers
    has none unless a config asks for router logits, and continued pretraining is to keep what the router learnt.
    """
    experts = experts_of(config)
    assert experts is not None
    every = all(experts.layers)
    return {
        "num_moe_experts": experts.count,
        "moe_router_topk": experts.active,
        "moe_ffn_hidden_size": experts.ffn,
        "moe_layer_freq": 1 if every else [int(sparse) for sparse in experts.layers],
        "moe_router_pre_softmax": not normalised,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": False,
        "expert_tensor_parallel_size": 1,
    }


def refuse_unless(config: Any, key: str, allowed: tuple[Any, ...]) -> None:
    """Raise UserError unless config.json's `key`, as transformers reads it, is missing or one of `allowed`."""
    value = getattr(config, key, allowed[0])
    if value not in allowed:
        wanted = " or ".join(repr(a) for a in allowed)
        raise UserError(f"config.json: {key} = {value!r} is not supported; it must be {wanted}")


def plain_mlp(config: Any) -> None:
    """The check of a family with SwiGLU and without biases."""
    refuse_unless(config, "hidden_act", ("silu",))
    refuse_unless(config, "attention_bias", (False, None))
    refuse_unless(config, "mlp_bias", (False, None))


def plain_experts(config: Any, *, normalised: bool) -> None:
    """The same with experts; `normalised`: the weights of a token's experts add up to 1."""
    plain_mlp(config)
    if normalised and config.num_experts_per_tok == 1:
        raise UserError(
            "config.json: num_experts_per_tok = 1 is not supported where the weights of a token's experts add up to 1 "
            "(norm_topk_prob): the router would have no gradient"
        )
