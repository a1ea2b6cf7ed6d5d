"""Sizes of compact parameters: what trains of a logical matrix on a tensor-parallel rank.

A compact parameter P has, per logical matrix, the trainable columns [rows, K], the trainable rows [R, I] or the trainable
elements [1, n]. K, R and n are those of the rank with most of them, padded to a multiple of 16: P has one shape on all ranks.
Rows that pad the vocabulary do not belong to a matrix and are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

import numpy as np

from megatron_ssu.compact.rules import padded
from megatron_ssu.config.schema import RunConfig
from megatron_ssu.methods.base import Method
from megatron_ssu.models.family import Dims, Family
from megatron_ssu.shield.mask import Granularity
from megatron_ssu.shield.shield_file import Shield


@dataclass(frozen=True)
class MatrixShield:
    """What is frozen of one matrix."""

    granularity: Granularity
    frozen: float  # fraction of its elements
    units: np.ndarray | None = None  # bool, frozen columns [I] or rows [O]; None: unknown, or by element


@dataclass(frozen=True)
class Compact:
    """One logical matrix on a tensor-parallel rank; elements."""

    parameter: float  # of P, padding included
    gemm: float  # of the weight gradient that a GEMM computes
    read: float  # elements per token of the GEMM's input (columns) or output gradient (rows) that the gather reads
    written: float  # elements per token that it writes
    stored: float  # whose main weight and moments are in a checkpoint


def matrix_shields(
    method: Method, run: RunConfig, family: Family, dims: Dims, shield: Shield | None
) -> dict[str, MatrixShield]:
    """By Hugging Face name: those of `shield`, else what the method expects of the run file."""
    if shield is None:
        expected = method.expected_shield(run, list(family.matrices(dims)), dims)
        return {name: MatrixShield(granularity, frozen) for name, (granularity, frozen) in expected.items()}
    found, entries = {}, shield.header()["matrices"]
    for name in shield.matrices:
        granularity, frozen = entries[name]["granularity"], shield.ratio_of(name)
        partly = granularity != "element" and 0 < frozen < 1
        found[name] = MatrixShield(granularity, frozen, shield.masks[name].bits() if partly else None)
    return found


def compact(shield: MatrixShield | None, shape: Sequence[int], split: int | None, tensor: int, length: int) -> Compact:
    """A matrix [O, I] of a compact parameter.

    Args:
        split: dimension that `tensor` ranks divide; None: replicated.
        length: of this dimension on one rank; with a padded vocabulary more than its part of `shape`.
    """
    ranks = tensor if split is not None else 1
    elements = prod(shape) / ranks
    if shield is None or shield.frozen == 0:
        return Compact(elements, elements, 0, 0, elements)
    if shield.frozen == 1:
        return Compact(0, 0, 0, 0, 0)
    if shield.granularity == "element":
        trainable = elements * (1 - shield.frozen)
        return Compact(padded(_whole(trainable)), elements, 0, 0, elements)
    axis = 1 if shield.granularity == "column" else 0
    across = shape[1 - axis] / (ranks if split == 1 - axis else 1)  # elements of a column or row
    counts = _trainable_units(shield, shape[axis], ranks if split == axis else 1, length)
    most, units = max(counts), max(units for _, units in counts)
    kept = padded(_whole(most[0]))  # P has one shape on all ranks, and all of them gather
    return Compact(kept * across, kept * across, units, kept, elements * (1 - shield.frozen))


def _whole(count: float) -> int:
    """An average count rounded up, past what its division left over."""
    return ceil(round(count, 6))


def _trainable_units(shield: MatrixShield, units: int, ranks: int, length: int) -> list[tuple[float, float]]:
    """Per rank: trainable columns or rows, and all of them; the average on every rank where the mask is not known."""
    if shield.units is None:
        return [((1 - shield.frozen) * units / ranks, units / ranks)] * ranks
    step = length if ranks > 1 else units
    parts = [shield.units[rank * step : (rank + 1) * step] for rank in range(ranks)]
    return [(float(part.size - np.count_nonzero(part)), float(part.size)) for part in parts]
