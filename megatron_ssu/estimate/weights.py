"""Weights, gradients and optimizer state of every pipeline stage, counted from the family's table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from megatron_ssu.compact.rules import is_pinned
from megatron_ssu.estimate.compact import Compact, MatrixShield, compact
from megatron_ssu.estimate.flops import token_share
from megatron_ssu.models.family import Dims, Entry, Family, padded_vocab

# How a weight trains:
#   plain    nothing of it is frozen: a parameter
#   pinned   hardly anything is frozen, or it is a norm: a parameter, whose frozen elements are put back
#   compact  its trainable elements are a parameter of their own beside it
#   frozen   all of it is frozen: no gradient, no optimizer state
Training = Literal["plain", "pinned", "compact", "frozen"]


@dataclass(frozen=True)
class Parameter:
    """One megatron parameter on the average tensor-parallel rank; elements."""

    name: str
    elements: int  # of the weight itself
    frozen: float
    linear: bool  # the weight of a layer's linear layer
    split: bool  # over tensor-parallel ranks
    training: Training
    compact: float  # of the compact parameters beside it, padding included
    gemm: float  # of the weight gradient that GEMMs compute, where they can leave frozen columns and rows out
    read: float  # per token, to gather the trainable columns and rows of the GEMMs' operands; see `_read`
    written: float  # per token, likewise
    stored: float  # whose main weight and moments are in a checkpoint
    share: float = 1.0  # of the tokens that reach the rank, those that the weight multiplies
    expert: bool = False  # its replicas are an expert's

    @property
    def trainable(self) -> float:
        return self.elements - self.frozen

    @property
    def trained(self) -> float:
        """Those that have a gradient, a main weight and moments, and that data-parallel ranks exchange."""
        return {"plain": self.elements, "pinned": self.elements, "compact": self.compact, "frozen": 0.0}[self.training]


@dataclass(frozen=True)
class Formats:
    """Bytes per element."""

    weight: int  # 2 in bf16, 4 in fp32
    gradient: int  # of the gradient buffer


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank of a stage."""

    weights: int  # compact parameters included
    gradients: int
    optimizer: int  # main weights and moments that are memory of their own
    gradient_copies: int  # in fp32, while the optimizer works
    source: int  # of the source model, for train.regularize

    @property
    def lasting(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.source


@dataclass(frozen=True)
class Shards:
    """Parts that optimizer state is divided into: the ranks that hold the same weights."""

    dense: int
    expert: int

    def of(self, parameter: Parameter) -> int:
        return self.expert if parameter.expert else self.dense

    def trained(self, parameters: Sequence[Parameter]) -> float:
        """Elements of a rank's part of the optimizer state."""
        return sum(p.trained / self.of(p) for p in parameters)


def layer_parameters(
    family: Family, dims: Dims, layer: int, tensor: int, shields: Mapping[str, MatrixShield], expert_ranks: int = 1
) -> list[Parameter]:
    """Parameters of a layer on one of `tensor` ranks, of its experts those of the first of `expert_ranks`; `shields`: of the
    shielded matrices, by Hugging Face name."""
    local = dims.experts.count // expert_ranks if dims.experts else 0
    return [
        _parameter(entry, dims, layer, tensor, shields, 0, expert, expert_ranks)
        for entry, expert in family.entries(dims, layer)
        if expert is None or expert < local
    ]


def added_parameter(elements: int) -> Parameter:
    """All of a stage's parameters that a method has put beside the layers' weights; they are linear layers themselves."""
    return Parameter("adapters", elements, 0.0, True, True, "plain", 0.0, elements, 0.0, 0.0, elements)


def edge_parameters(
    family: Family,
    dims: Dims,
    tensor: int,
    divisible_by: int,
    shields: Mapping[str, MatrixShield],
    *,
    first: bool,
    last: bool,
) -> Iterator[Parameter]:
    """Embedding (on the first stage), final norm and head (on the last); a tied head on a stage of its own is a copy."""
    rows = padded_vocab(dims.vocab, divisible_by)
    for entry in family.edges:
        kind = entry.kinds[0]
        here = first if kind == "embedding" else last
        if kind == "embedding" and dims.tied:
            here = first or last
        if here and not (kind == "head" and dims.tied):
            padding = rows - dims.vocab if entry.form == "vocab" else 0
            yield _parameter(entry, dims, None, tensor, shields, padding)


def _parameter(
    entry: Entry,
    dims: Dims,
    layer: int | None,
    tensor: int,
    shields: Mapping[str, MatrixShield],
    padding: int,
    expert: int | None = None,
    expert_ranks: int = 1,
) -> Parameter:
    """`padding`: rows that pad the vocabulary."""
    matrices = entry.matrices(dims, layer, expert)
    shapes = [matrix.shape for matrix in matrices]
    own = [shields.get(matrix.name) for matrix in matrices]
    sizes = [prod(shape) for shape in shapes]
    frozen = sum(size * shield.frozen for size, shield in zip(sizes, own, strict=True) if shield is not None)
    ranks = tensor if entry.split is not None else 1
    elements = (sum(sizes) + padding * prod(shapes[0][1:])) / ranks
    training = _training(len(shapes[0]), frozen / sum(sizes))
    found = [Compact(elements, elements, 0, 0, elements)]
    if training == "frozen":
        found = []
    elif training == "compact":
        found = [_compact(entry, shield, shape, tensor, padding) for shield, shape in zip(own, shapes, strict=True)]
    return Parameter(
        entry.param,
        round(elements),
        frozen / ranks,
        matrices[0].scored,
        entry.split is not None,
        training,
        sum(c.parameter for c in found) if training == "compact" else 0.0,
        sum(c.gemm for c in found),
        _read(own, found) if training == "compact" else 0.0,
        sum(c.written for c in found),
        sum(c.stored for c in found),
        # Sequence parallelism divides the tokens over tensor-parallel ranks; those of all expert-parallel ranks come here.
        1.0 if expert is None else token_share(dims, expert=True) * expert_ranks / tensor,
        expert is not None,
    )


def _compact(entry: Entry, shield: MatrixShield | None, shape: Sequence[int], tensor: int, padding: int) -> Compact:
    length = 0 if entry.split is None else (shape[entry.split] + padding) // tensor
    return compact(shield, shape, entry.split, tensor, length)


def _read(shields: Sequence[MatrixShield | None], found: Sequence[Compact]) -> float:
    """Of a weight's matrices: its input, which has the columns of all of them, once, and the output gradient of each."""
    by_column = [shield is not None and shield.granularity == "column" for shield in shields]
    inputs = [c.read for c, column in zip(found, by_column, strict=True) if column]
    outputs = [c.read for c, column in zip(found, by_column, strict=True) if not column]
    return max(inputs, default=0.0) + sum(outputs)


def _training(dimensions: int, frozen: float) -> Training:
    """`frozen`: fraction of the parameter's elements."""
    if frozen == 0:
        return "plain"
    if frozen == 1:
        return "frozen"
    return "pinned" if is_pinned(dimensions, frozen) else "compact"


def state_bytes(
    parameters: Sequence[Parameter], formats: Formats, shards: Shards, *, l2: bool = False, kl: bool = False
) -> StateBytes:
    """Bytes on a rank that holds `parameters` and its part of their optimizer state.

    fp32 main weight and two moments, 4 bytes each, for every element that is trained; in fp32 a parameter is its own main
    weight. Gradients that are not fp32 are copied in fp32 for the optimizer.
    `l2` copies the main weights, `kl` the model's weights.
    """
    trained, own = sum(p.trained for p in parameters), shards.trained(parameters)
    weights = sum(p.elements + p.compact for p in parameters)
    return StateBytes(
        round(weights * formats.weight),
        round(trained * formats.gradient),
        round((12 if formats.weight != 4 else 8) * own),
        round(4 * own) if formats.gradient != 4 else 0,
        round((4 * own if l2 else 0) + (formats.weight * sum(p.elements for p in parameters) if kl else 0)),
    )


def optimizer_bytes(parameters: Sequence[Parameter], formats: Formats, shards: Shards, *, l2: bool = False) -> int:
    """Bytes that a rank reads and writes in one optimizer step.

    Per trained element: the fp32 gradient is read for the norm, read and written by clipping, and read by Adam, which reads
    and writes main weight and moments; a main weight beside the weight is copied into it, and a gradient that is not fp32
    is copied before; `l2` reads main weight and source, and reads and writes the gradient. Then compact parameters are
    written into their weights, whose cache lines are all read and written.
    """
    per_element = 4 * 4 + 2 * 12
    if formats.weight != 4:
        per_element += formats.weight
    if formats.gradient != 4:
        per_element += formats.gradient + 4
    if l2:
        per_element += 4 * 4
    scattered = sum(p.compact + 2 * p.elements for p in parameters if p.training == "compact")
    return round(per_element * shards.trained(parameters) + formats.weight * scattered)
