"""What several families share: entries of their tables, layers, settings and checks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_ssu.errors import UserError
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


def norm(param: str, tensor: str, kind: str = "norm") -> Entry:
    """A norm of a layer, as wide as the hidden size, the same on all tensor-parallel ranks."""
    return Entry(param, (_L + tensor,), (kind,))


def centred(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """The entries with norms that are stored less 1."""
    return tuple(
        replace(e, kinds=tuple(f"centred_{kind}" if kind.endswith("norm") else kind for kind in e.kinds))
        for e in entries
    )


PRE_NORM = (
    norm("input_layernorm.weight", "input_layernorm.weight"),
    QKV,
    PROJ,
    norm("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
    FC1,
    FC2,
)
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


def epsilon(config: Any) -> dict[str, Any]:
    """The setting that all families have: the norms' epsilon."""
    return {"layernorm_epsilon": config.rms_norm_eps}


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
