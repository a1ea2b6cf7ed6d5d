"""How far weights moved: model parameter difference (MPD), raw and relative, by kind and layer.

Between a base A and further models B, C, each trained from it:

    difference    ||B - A||, the L2 norm over all weights (MPD of arXiv 2410.16006, where A is the other fine-tuning)
    relative      ||B - A|| / ||A||
    moved         fraction of the weights whose value is another
    of two        ||B - C||, the same over ||B - A|| and over ||C - A||, and the cosine of the two updates

Sums are in fp64 over the values as they are in the files; one tensor of each model is read at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

from megatron_ssu.errors import UserError
from megatron_ssu.models.source import Source

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 1 << 24  # elements compared at a time


@dataclass
class Moves:
    """Sums over some weights, of one model against the base."""

    elements: int = 0
    moved: int = 0
    square: float = 0.0  # of the difference
    base: float = 0.0  # square of the base
    largest: float = 0.0  # absolute change

    def add(self, other: Moves) -> None:
        self.elements += other.elements
        self.moved += other.moved
        self.square += other.square
        self.base += other.base
        self.largest = max(self.largest, other.largest)

    def to_dict(self) -> dict[str, Any]:
        return {
            "difference": math.sqrt(self.square),
            "relative": _ratio(self.square, self.base),
            "moved": self.moved / self.elements if self.elements else 0.0,
            "largest": self.largest,
            "elements": self.elements,
        }


@dataclass
class ModelMoves:
    """Of one model against the base: over all weights, and by (kind, layer); layer None outside the layers."""

    total: Moves = field(default_factory=Moves)
    parts: dict[tuple[str, int | None], Moves] = field(default_factory=dict)

    def by(self, place: int) -> dict[Any, Moves]:
        """Summed by kind (0) or by layer (1)."""
        found: dict[Any, Moves] = {}
        for key, moves in self.parts.items():
            found.setdefault(key[place], Moves()).add(moves)
        return found

    def to_dict(self) -> dict[str, Any]:
        kinds = {kind: moves.to_dict() for kind, moves in self.by(0).items()}
        layers = {
            str(layer): moves.to_dict() for layer, moves in sorted(self.by(1).items(), key=str) if layer is not None
        }
        return {**self.total.to_dict(), "kinds": kinds, "layers": layers}


@dataclass
class PairMoves:
    """Sums of two models' updates from the base."""

    square: float = 0.0  # of the difference of the two
    product: float = 0.0  # of the two updates

    def to_dict(self, first: Moves, second: Moves) -> dict[str, float]:
        return {
            "difference": math.sqrt(self.square),
            "relative_to_first_update": _ratio(self.square, first.square),
            "relative_to_second_update": _ratio(self.square, second.square),
            "cosine_of_updates": self.product / math.sqrt(first.square * second.square)
            if first.square and second.square
            else math.nan,
        }


@dataclass
class WeightDrift:
    """What `compare_weights` found: by model, and by pair of models."""

    models: list[ModelMoves]
    pairs: dict[tuple[int, int], PairMoves]


def compare_weights(base: Source, others: Sequence[Source]) -> WeightDrift:
    """Every model of `others` with the base, and with each other.

    Raises UserError where one has tensors of other names or shapes, or a weight that is NaN or infinite.
    """
    check_alike(base, others)
    found = WeightDrift(
        [ModelMoves() for _ in others], {pair: PairMoves() for pair in combinations(range(len(others)), 2)}
    )
    matrices = {m.name: m for m in base.family.matrices(base.dims)}
    for name in base.checkpoint.parts(matrices):
        matrix = matrices.get(name)
        key = (matrix.kind, matrix.layer) if matrix else ("other", None)
        sums = [Moves() for _ in others]
        weights = [source.checkpoint.get(name).reshape(-1) for source in (base, *others)]
        for start in range(0, weights[0].numel(), _CHUNK):
            own, *chunks = (weight[start : start + _CHUNK] for weight in weights)
            updates = []
            for number, chunk in enumerate(chunks):
                update, moves = _moves(own, chunk, name, others[number])
                sums[number].add(moves)
                updates.append(update)
            for (i, j), pair in found.pairs.items():
                pair.square += float((updates[i] - updates[j]).square().sum())
                pair.product += float((updates[i] * updates[j]).sum())
        for model, moves in zip(found.models, sums, strict=True):
            model.total.add(moves)
            model.parts.setdefault(key, Moves()).add(moves)
    return found


def _moves(base: Tensor, other: Tensor, name: str, source: Source) -> tuple[Tensor, Moves]:
    """The difference in fp64, and its sums."""
    import torch

    before = base.to(torch.float64)
    update = other.to(torch.float64) - before
    square = float(update.square().sum())
    if not math.isfinite(square):
        raise UserError(f"{source.path}: {name} has NaN or infinite values; look for a broken checkpoint")
    moved, largest = int((update != 0).sum()), float(update.abs().max()) if update.numel() else 0.0
    return update, Moves(update.numel(), moved, square, float(before.square().sum()), largest)


def check_alike(base: Source, others: Sequence[Source]) -> None:
    """Raises UserError where a model has tensors of other names or shapes than the base."""
    for other in others:
        _check_tensors(base, other)


def _check_tensors(base: Source, other: Source) -> None:
    ours, theirs = set(base.checkpoint.names()), set(other.checkpoint.names())
    for missing, lacking in ((ours - theirs, other), (theirs - ours, base)):
        if missing:
            raise UserError(
                f"{lacking.path}: lacks {len(missing)} tensors that the other model has, such as {min(missing)}"
            )
    for name in sorted(ours):
        if base.checkpoint.shape(name) != other.checkpoint.shape(name):
            raise UserError(
                f"{other.path}: {name} is {list(other.checkpoint.shape(name))}, in {base.path} "
                f"{list(base.checkpoint.shape(name))}; compare models of one definition"
            )


def _ratio(square: float, base: float) -> float:
    return math.sqrt(square / base) if base else math.nan
