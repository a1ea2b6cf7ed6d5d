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
from megatron_ssu.models.attention import LayerAttention, layer_attention
from megatron_ssu.models.experts import Experts, experts_of
from megatron_ssu.models.hf_config import normalised
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

    param: str  # megatron's name, within its layer or its model; {expert} stands for the expert's number
    tensors: tuple[str, ...]  # Hugging Face names; {layer} and {expert} stand for the layer's and the expert's number
    # Matrix.kind of each tensor; further kinds (Dims.shape) say how large a norm or a bias is: q_norm and k_norm are as wide
    # as a projection, head_norm is one for all heads, centred ones are stored less 1
    kinds: tuple[str, ...]
    split: int | None = None  # dimension that tensor parallelism splits; None: replicated
    form: Form = "plain"
    only: Literal["dense", "sparse"] | None = None  # the layers that have it: those without or with experts; None: all

    @property
    def per_expert(self) -> bool:
        """Whether every expert of a layer has one."""
        return "{expert}" in self.param

    def matrices(self, dims: Dims, layer: int | None, expert: int | None = None) -> tuple[Matrix, ...]:
        """The matrices that the parameter consists of, in `layer` or outside the layers."""
        return tuple(
            Matrix(
                _window(tensor, kind, dims).format(layer=layer, expert=expert),
                dims.shape(kind),
                layer,
                _matrix_kind(kind),
            )
            for tensor, kind in zip(self.tensors, self.kinds, strict=True)
        )


def _matrix_kind(kind: str) -> str:
    if kind.endswith("norm"):
        return "centred_norm" if kind.startswith("centred") else "norm"
    return "bias" if kind.endswith("bias") else kind.removeprefix("expert_")


def _window(tensor: str, kind: str, dims: Dims) -> str:
    """The tensor's name; of a tensor that holds several matrices (`NAME[kind,kind]`) the rows of this one: `NAME[0:64]`."""
    name, _, inside = tensor.partition("[")
    if not inside:
        return name
    kinds = inside.removesuffix("]").split(",")
    first = sum(dims.shape(other)[0] for other in kinds[: kinds.index(kind)])
    return f"{name}[{first}:{first + dims.shape(kind)[0]}]"


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
    attention: tuple[LayerAttention, ...] = ()  # of each layer; empty: full, with rope, in all
    experts: Experts | None = None

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Dims:
        """Raises UserError where config.json lacks a size, or transformers refuses it."""
        try:
            heads, hidden = hf["num_attention_heads"], hf["hidden_size"]
            config = normalised(hf)
            return cls(
                layers=hf["num_hidden_layers"],
                hidden=hidden,
                heads=heads,
                groups=hf.get("num_key_value_heads") or heads,
                head=getattr(config, "head_dim", None) or hidden // heads,
                ffn=hf["intermediate_size"],
                vocab=hf["vocab_size"],
                positions=hf["max_position_embeddings"],
                tied=bool(config.tie_word_embeddings),
                attention=layer_attention(config),
                experts=experts_of(config),
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

    def sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.experts is not None and self.experts.layers[layer]

    def shape(self, kind: str) -> tuple[int, ...]:
        """Shape of a tensor of `kind`, [O, I] or [H]."""
        query, key = self.heads * self.head, self.groups * self.head
        experts, expert_ffn = (self.experts.count, self.experts.ffn) if self.experts else (0, 0)
        shapes: dict[str, tuple[int, ...]] = {
            "q_proj": (query, self.hidden),
            "k_proj": (key, self.hidden),
            "v_proj": (key, self.hidden),
            "o_proj": (self.hidden, query),
            "gate_proj": (self.ffn, self.hidden),
            "up_proj": (self.ffn, self.hidden),
            "down_proj": (self.hidden, self.ffn),
            "expert_gate_proj": (expert_ffn, self.hidden),
            "expert_up_proj": (expert_ffn, self.hidden),
            "expert_down_proj": (self.hidden, expert_ffn),
            "router": (experts, self.hidden),
            "embedding": (self.vocab, self.hidden),
            "head": (self.vocab, self.hidden),
            "norm": (self.hidden,),
            "q_norm": (query,),
            "k_norm": (key,),
            "head_norm": (self.head,),
            "centred_norm": (self.hidden,),
            "centred_head_norm": (self.head,),
            "q_bias": (query,),
            "k_bias": (key,),
            "v_bias": (key,),
        }
        return shapes[kind]


@dataclass(frozen=True)
class Scales:
    """Factors and caps around a model's layers; a cap c makes x into c tanh(x / c)."""

    embedding: float | None = None  # of the embeddings, rounded to their dtype
    attention: float | None = None  # of q k^T; None: 1 / sqrt(head)
    attention_cap: float | None = None  # of the scores, before the mask
    logit_cap: float | None = None


@dataclass(frozen=True)
class Family:
    """A model family; see the module docstring."""

    name: str
    model_types: tuple[str, ...]  # config.json's model_type
    layer: tuple[Entry, ...]
    edges: tuple[Entry, ...]  # outside the layers: embedding, final norm, head
    # TransformerConfig fields that config.json decides, as transformers reads it; `layers` has those that all share
    settings: Callable[[Any], dict[str, Any]]
    layer_spec: Callable[[Dims, bool], ModuleSpec]  # (dims, with Transformer Engine)
    check: Callable[[Any], None]  # raises UserError for settings that the family's code does not carry
    scales: Callable[[Any], Scales] = lambda config: Scales()
    ignored: tuple[str, ...] = field(default=())  # patterns of tensors in checkpoints that are not weights

    def matrices(self, dims: Dims) -> Iterator[Matrix]:
        """All tensors of a checkpoint of this family in the order of the model; a tied head is left out."""
        for entry in self.edges:
            if entry.kinds[0] == "embedding":
                yield from entry.matrices(dims, None)
        for layer in range(dims.layers):
            for entry, expert in self.entries(dims, layer):
                yield from entry.matrices(dims, layer, expert)
        for entry in self.edges:
            if entry.kinds[0] != "embedding" and not (dims.tied and entry.kinds[0] == "head"):
                yield from entry.matrices(dims, None)

    def present(self, dims: Dims, layer: int) -> list[Entry]:
        """The entries that a layer has."""
        absent = "dense" if dims.sparse(layer) else "sparse"
        return [entry for entry in self.layer if entry.only != absent]

    def entries(self, dims: Dims, layer: int) -> Iterator[tuple[Entry, int | None]]:
        """The entries of a layer in order, those of experts expert by expert, at their end, with the expert's number."""
        present = self.present(dims, layer)
        yield from ((entry, None) for entry in present if not entry.per_expert)
        for expert in range(dims.experts.count if dims.experts else 0):
            yield from ((entry, expert) for entry in present if entry.per_expert)

    def linear_matrices(self, dims: Dims) -> list[Matrix]:
        """The weight matrices of the linear layers: those that a shield's scores rank."""
        return [m for m in self.matrices(dims) if m.scored]

    def is_ignored(self, tensor: str) -> bool:
        return any(re.fullmatch(pattern, tensor) for pattern in self.ignored)


def padded_vocab(vocab: int, divisible_by: int) -> int:
    """Rows of embedding and head in megatron; the same on every mesh, so that checkpoints move between meshes."""
    return -(-vocab // divisible_by) * divisible_by
