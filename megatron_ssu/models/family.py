"""What a model family is: a table from Hugging Face tensors to megatron parameters, and its settings.

A family file (families/olmo2.py, families/llama.py) holds one `Family`; nothing else in the project knows tensor names. To
add one: write the table, name its settings, add it to `FAMILIES`. Tables are read without megatron-core, which only
`layer_spec` imports.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from megatron_ssu.errors import UserError
from megatron_ssu.models.matrix import Matrix

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec

# How the tensors of an entry are laid into the rows of its megatron parameter:
#   plain  one tensor as it is
#   vocab  one tensor [V, H], rows padded to the padded vocabulary
#   qkv    query, key, value rows interleaved by query group
#   gated  gate rows, then up rows, on each tensor-parallel rank
Form = Literal["plain", "vocab", "qkv", "gated"]


@dataclass(frozen=True)
class Entry:
    """One megatron parameter and the Hugging Face tensors that it is made of."""

    param: str  # megatron's name, within its layer or its model
    tensors: tuple[str, ...]  # Hugging Face names; {layer} stands for the layer's number
    kinds: tuple[str, ...]  # Matrix.kind of each tensor; q_norm and k_norm: norms as wide as a projection
    split: int | None = None  # dimension that tensor parallelism splits; None: replicated
    form: Form = "plain"

    def matrices(self, dims: Dims, layer: int | None) -> tuple[Matrix, ...]:
        """The matrices that the parameter consists of, in `layer` or outside the layers."""
        return tuple(
            Matrix(tensor.format(layer=layer), dims.shape(kind), layer, "norm" if kind.endswith("norm") else kind)
            for tensor, kind in zip(self.tensors, self.kinds, strict=True)
        )


@dataclass(frozen=True)
class Dims:
    """The sizes of a model that its Hugging Face config states."""

    layers: int
    hidden: int
    heads: int
    groups: int  # key/value heads
    head: int
    ffn: int
    vocab: int
    positions: int
    tied: bool

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Dims:
        """Raises UserError where config.json lacks a size."""
        try:
            heads, hidden = hf["num_attention_heads"], hf["hidden_size"]
            return cls(
                layers=hf["num_hidden_layers"],
                hidden=hidden,
                heads=heads,
                groups=hf.get("num_key_value_heads") or heads,
                head=hf.get("head_dim") or hidden // heads,
                ffn=hf["intermediate_size"],
                vocab=hf["vocab_size"],
                positions=hf["max_position_embeddings"],
                tied=bool(hf.get("tie_word_embeddings", False)),
            )
        except KeyError as error:
            raise UserError(
                f"config.json: {error.args[0]} is missing; it must be the config of a supported model"
            ) from None
        except (TypeError, ZeroDivisionError):
            raise UserError(
                f"config.json: hidden_size {hf['hidden_size']!r} and num_attention_heads {hf['num_attention_heads']!r} must be "
                "whole numbers above 0; copy the file again"
            ) from None

    def shape(self, kind: str) -> tuple[int, ...]:
        """Shape of a tensor of `kind`, [O, I] or [H]."""
        query, key = self.heads * self.head, self.groups * self.head
        shapes: dict[str, tuple[int, ...]] = {
            "q_proj": (query, self.hidden),
            "k_proj": (key, self.hidden),
            "v_proj": (key, self.hidden),
            "o_proj": (self.hidden, query),
            "gate_proj": (self.ffn, self.hidden),
            "up_proj": (self.ffn, self.hidden),
            "down_proj": (self.hidden, self.ffn),
            "embedding": (self.vocab, self.hidden),
            "head": (self.vocab, self.hidden),
            "norm": (self.hidden,),
            "q_norm": (query,),
            "k_norm": (key,),
        }
        return shapes[kind]


@dataclass(frozen=True)
class Family:
    """A model family; see the module docstring."""

    name: str
    model_types: tuple[str, ...]  # config.json's model_type
    layer: tuple[Entry, ...]
    edges: tuple[Entry, ...]  # outside the layers: embedding, final norm, head
    settings: Callable[[dict[str, Any], Dims], dict[str, Any]]  # TransformerConfig fields that config.json decides
    layer_spec: Callable[[Dims, bool], ModuleSpec]  # (dims, with Transformer Engine)
    check: Callable[[dict[str, Any]], None]  # raises UserError for settings that the family's code does not carry
    ignored: tuple[str, ...] = field(default=())  # patterns of tensors in checkpoints that are not weights

    def matrices(self, dims: Dims) -> Iterator[Matrix]:
        """All tensors of a checkpoint of this family in the order of the model; a tied head is left out."""
        for entry in self.edges:
            if entry.kinds[0] == "embedding":
                yield from entry.matrices(dims, None)
        for layer in range(dims.layers):
            for entry in self.layer:
                yield from entry.matrices(dims, layer)
        for entry in self.edges:
            if entry.kinds[0] != "embedding" and not (dims.tied and entry.kinds[0] == "head"):
                yield from entry.matrices(dims, None)

    def linear_matrices(self, dims: Dims) -> list[Matrix]:
        """The weight matrices of the linear layers: those that a shield's scores rank."""
        return [m for m in self.matrices(dims) if m.layer is not None and m.kind != "norm"]

    def is_ignored(self, tensor: str) -> bool:
        return any(re.fullmatch(pattern, tensor) for pattern in self.ignored)


_L = "model.layers.{layer}."

# What OLMo-2 and Llama name alike.
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


def norm(param: str, tensor: str) -> Entry:
    """A norm of a layer, as wide as the hidden size, the same on all tensor-parallel ranks."""
    return Entry(param, (_L + tensor,), ("norm",))


def padded_vocab(vocab: int, divisible_by: int) -> int:
    """Rows of embedding and head in megatron; the same on every mesh, so that checkpoints move between meshes."""
    return -(-vocab // divisible_by) * divisible_by


def refuse_unless(hf: dict[str, Any], key: str, allowed: tuple[Any, ...]) -> None:
    """Raise UserError unless config.json's `key`, if given, is one of `allowed`."""
    if key in hf and hf[key] not in allowed:
        wanted = " or ".join(repr(a) for a in allowed)
        raise UserError(f"config.json: {key} = {hf[key]!r} is not supported; it must be {wanted}")
