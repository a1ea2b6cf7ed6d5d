"""Weights, gradients and optimizer state of every pipeline stage, counted from the family's table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from megatron_ssu.models.family import Dims, Entry, Family, padded_vocab


@dataclass(frozen=True)
class Parameter:
    """One megatron parameter on a tensor-parallel rank."""

    name: str
    elements: int
    frozen: float  # of these elements, on the average rank
    linear: bool  # the weight of a layer's linear layer
    split: bool  # over tensor-parallel ranks

    @property
    def trainable(self) -> float:
        return self.elements - self.frozen


@dataclass(frozen=True)
class Formats:
    """Bytes of an element."""

    weight: int  # 2 in bf16, 4 in fp32
    gradient: int  # of the gradient buffer


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank of a stage."""

    weights: int
    gradients: int
    optimizer: int  # main weights and moments that are memory of their own
    gradient_copies: int  # fp32 copies of trainable gradients while the optimizer works

    @property
    def lasting(self) -> int:
        return self.weights + self.gradients + self.optimizer


def layer_parameters(
    family: Family, dims: Dims, layer: int, tensor: int, frozen: Mapping[str, float]
) -> list[Parameter]:
    """Parameters of a layer on one of `tensor` ranks; `frozen`: share of a matrix that is frozen, by Hugging Face name."""
    return [_parameter(entry, dims, layer, tensor, frozen, dims.shape) for entry in family.layer]


def edge_parameters(
    family: Family, dims: Dims, tensor: int, divisible_by: int, frozen: Mapping[str, float], *, first: bool, last: bool
) -> Iterator[Parameter]:
    """Embedding (on the first stage), final norm and head (on the last); a tied head on a stage of its own is a copy."""
    rows = padded_vocab(dims.vocab, divisible_by)

    def shape(kind: str) -> tuple[int, ...]:
        return (rows, dims.hidden) if kind in ("embedding", "head") else dims.shape(kind)

    for entry in family.edges:
        kind = entry.kinds[0]
        here = first if kind == "embedding" else last
        if kind == "embedding" and dims.tied:
            here = first or last
        if here and not (kind == "head" and dims.tied):
            yield _parameter(entry, dims, None, tensor, frozen, shape)


def _parameter(entry: Entry, dims: Dims, layer: int | None, tensor: int, frozen: Mapping, shape: object) -> Parameter:
    elements = shares = 0.0
    for name, kind in zip(entry.tensors, entry.kinds, strict=True):
        size = prod(shape(kind))  # type: ignore[operator]
        elements += size
        shares += size * frozen.get(name.format(layer=layer), 0.0)
    parts = tensor if entry.split is not None else 1
    linear = layer is not None and not entry.kinds[0].endswith("norm")
    return Parameter(entry.param, round(elements / parts), shares / parts, linear, entry.split is not None)


def state_bytes(parameters: list[Parameter], formats: Formats, shards: int) -> StateBytes:
    """Bytes on a rank that holds `parameters` and one of `shards` parts of their optimizer state.

    fp32 main weight and two moments, 4 bytes each, for trainable elements. In fp32 a parameter without frozen elements is
    its own main weight; one with some has a compact main weight beside it. Gradients that are not fp32, and those of
    shielded parameters, are copied in fp32 for the optimizer.
    """
    optimizer = copies = 0.0
    for p in parameters:
        own_main = formats.weight != 4 or p.frozen > 0
        optimizer += (12 if own_main else 8) * p.trainable
        copies += 4 * p.trainable if formats.gradient != 4 or p.frozen > 0 else 0
    elements = sum(p.elements for p in parameters)
    return StateBytes(
        elements * formats.weight, elements * formats.gradient, round(optimizer / shards), round(copies / shards)
    )
