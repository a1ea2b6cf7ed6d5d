"""A shield as a table: what is frozen where, by how much, and how much of it another shield freezes too."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from megatron_ssu.errors import UserError
from megatron_ssu.models.hf_config import difference
from megatron_ssu.models.matrix import KINDS, Matrix, of_experts
from megatron_ssu.scoring.registry import SCORES
from megatron_ssu.scoring.scores_file import Scores
from megatron_ssu.shield.mask import Mask
from megatron_ssu.shield.ranking import axis_scores, layer_scores, matrix_score
from megatron_ssu.shield.select import ProtectRule, protected
from megatron_ssu.shield.shield_file import Shield, check_model


@dataclass(frozen=True)
class ScoreView:
    """Scores of one matrix and where the shield cuts them; None: nothing frozen, or nothing trainable."""

    values: np.ndarray  # float64 [units], as ranked; [1] where whole matrices are
    frozen: np.ndarray  # bool [units]
    last_frozen: (
        float | None
    )  # score of the frozen unit next to the cut; of whole matrices: among those it is ranked with
    first_trainable: float | None  # score of the trainable unit next to the cut
    lowest: bool = False  # the lowest scores are frozen

    @property
    def margin(self) -> float | None:
        """How far the last frozen score lies above (with `lowest` below) the first trainable one, relative.

        0 is a tie; negative: the shield was not made by this score alone.
        """
        if self.last_frozen is None or self.first_trainable is None:
            return None
        scale = max(abs(self.last_frozen), abs(self.first_trainable))
        margin = (self.last_frozen - self.first_trainable) / scale if scale else 0.0
        return -margin if self.lowest and margin else margin


@dataclass(frozen=True)
class Overlap:
    """Frozen elements of two shields in one matrix."""

    both: int
    ours: int
    theirs: int

    @property
    def jaccard(self) -> float:
        """Frozen in both over frozen in either; two empty masks are equal: 1."""
        either = self.ours + self.theirs - self.both
        return self.both / either if either else 1.0

    @property
    def share(self) -> float:
        """How much of ours is frozen there too."""
        return self.both / self.ours if self.ours else 1.0


@dataclass(frozen=True)
class MatrixView:
    """One line of the table."""

    matrix: Matrix
    granularity: str
    units: int
    frozen_units: int
    ratio: float
    scores: ScoreView | None
    overlap: Overlap | None
    experts: int = 1  # whose matrices it is about


@dataclass(frozen=True)
class Inspection:
    """What `inspect_shield` found; `render` prints it, `draw` (in figures.py) pictures it."""

    shield: Shield
    views: tuple[MatrixView, ...]
    score: str | None
    other: Shield | None

    def lines(self) -> list[MatrixView]:
        """`views` with one in place of those of a layer's experts."""
        found: dict[tuple[int | None, str, str], list[MatrixView]] = {}
        for view in self.views:
            found.setdefault((view.matrix.layer, of_experts(view.matrix.name), view.granularity), []).append(view)
        return [_together(views) for views in found.values()]

    def kinds(self) -> list[str]:
        """Kinds that occur, in the order of the model."""
        return [kind for kind in KINDS if any(v.matrix.kind == kind for v in self.views)]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.shield.model,
            "method": self.shield.method,
            "score": self.score,
            "realised": self.shield.realised(),
            "matrices": [_to_dict(view) for view in self.views],
        }

    def render(self, console: Console, *, layers: Iterable[int] | None = None) -> None:
        """Print where the shield comes from, a line per matrix (one for those of a layer's experts; only of `layers`, when
        given) and a summary by kind."""
        wanted = None if layers is None else set(layers)
        _render_head(console, self)
        console.print(_matrix_table(self, [v for v in self.lines() if wanted is None or v.matrix.layer in wanted]))
        console.print(_kind_table(self))


def inspect_shield(
    shield: Shield, scores: Scores | None = None, other: Shield | None = None, *, score: str | None = None
) -> Inspection:
    """Look at a shield; with `scores` also at score ranges and margins, with `other` at the overlap.

    score: the one to show, by default the shield's own. Element masks show no scores: those would need the weights.
    UserError when scores or the other shield are of another model, or the score is not in the file.
    """
    if other is not None:
        check_model(other, shield.fingerprint, shield.model)
    if scores is None:
        if score is not None:
            raise UserError(f"inspect: score {score} was asked for without a scores file; give one")
    else:
        if scores.fingerprint != shield.fingerprint:
            raise UserError(
                f"{shield.label}: made for model {shield.model}, but the scores are of model {scores.model}: other "
                f"{difference(scores.fingerprint, shield.fingerprint)}"
            )
        score = score or shield.score
        if score not in scores.scores and not (score in SCORES and SCORES[score].needs == "seed"):
            raise UserError(
                f"inspect: no score {score} in the scores file; name one with --score: {', '.join(scores.scores)}"
            )
    views, whole = [], {}
    if scores is not None and score and shield.granularity in ("matrix", "layer"):
        whole = _whole_views(scores, score, shield)
    for name in sorted(shield.matrices, key=lambda n: _order(shield.matrices[n])):
        matrix, mask = shield.matrices[name], shield.masks[name]
        seen = whole.get(name)
        if scores is not None and score and shield.granularity not in ("matrix", "layer"):
            seen = _score_view(scores, score, matrix, mask, shield)
        overlap = None if other is None else overlap_of(mask, other.masks.get(name))
        views.append(
            MatrixView(matrix, mask.granularity, mask.units, mask.frozen_units, shield.ratio_of(name), seen, overlap)
        )
    return Inspection(shield, tuple(views), score, other)


def _together(views: Sequence[MatrixView]) -> MatrixView:
    """One view of the same matrix of several experts. Each has a cut of its own: there is none of all."""
    first = views[0]
    if len(views) == 1:
        return first
    seen = [view.scores for view in views if view.scores is not None]
    overlaps = [view.overlap for view in views if view.overlap is not None]
    scores = None
    if seen:
        values, frozen = (np.concatenate([getattr(view, key) for view in seen]) for key in ("values", "frozen"))
        scores = ScoreView(values, frozen, None, None, seen[0].lowest)
    return MatrixView(
        replace(first.matrix, name=of_experts(first.matrix.name)),
        first.granularity,
        sum(view.units for view in views),
        sum(view.frozen_units for view in views),
        fmean(view.ratio for view in views),
        scores,
        Overlap(*(sum(getattr(o, key) for o in overlaps) for key in ("both", "ours", "theirs"))) if overlaps else None,
        len(views),
    )


def overlap_of(ours: Mask, theirs: Mask | None) -> Overlap:
    """Count frozen elements in common; None freezes nothing."""
    if theirs is None:
        return Overlap(0, ours.frozen_elements, 0)
    if ours.shape != theirs.shape:
        raise UserError(f"inspect: a matrix is {ours.shape} in one shield and {theirs.shape} in the other")
    counts = ours.frozen_elements, theirs.frozen_elements
    if ours.granularity != theirs.granularity:
        ours, theirs = ours.to_elements(), theirs.to_elements()
    return Overlap(Mask(ours.granularity, ours.shape, ours.packed & theirs.packed).frozen_elements, *counts)


def _score_view(scores: Scores, score: str, matrix: Matrix, mask: Mask, shield: Shield) -> ScoreView | None:
    if not matrix.scored or mask.granularity == "element":
        return None
    axis: Literal["column", "row"] = "row" if mask.granularity == "row" else "column"
    values = axis_scores(scores, score, axis, matrix, int(shield.plan.get("seed", 0)))
    frozen, lowest = mask.bits(), shield.plan.get("freeze") == "lowest"
    return ScoreView(values, frozen, *_cut(values, frozen, lowest), lowest)


def _cut(values: np.ndarray, frozen: np.ndarray, lowest: bool) -> tuple[float | None, float | None]:
    """The scores at both sides of the cut: of the last frozen and the first trainable unit."""
    inner, outer = (np.max, np.min) if lowest else (np.min, np.max)
    last = float(inner(values[frozen])) if frozen.any() else None
    first = float(outer(values[~frozen])) if not frozen.all() else None
    return last, first


def _whole_views(scores: Scores, score: str, shield: Shield) -> dict[str, ScoreView]:
    """Scores of the matrices, or of their layers, that a shield by matrix or layer ranks; protected ones are left out."""
    rules = [ProtectRule(**rule) for rule in shield.plan.get("protect", [])]
    fixed = protected(scores.matrices, rules)
    ranked = {n: m for n, m in shield.matrices.items() if m.scored and n not in fixed}
    values = {n: matrix_score(scores, score, m, int(shield.plan.get("seed", 0))) for n, m in ranked.items()}
    groups: dict[str, list[str]] = {}
    if shield.granularity == "layer":
        layers = layer_scores(values, ranked)
        values = {n: layers[m.layer] for n, m in ranked.items() if m.layer is not None}
        groups["layer"] = list(values)
    else:
        for name, matrix in ranked.items():
            groups.setdefault(matrix.kind, []).append(name)
    views, lowest = {}, shield.plan.get("freeze") == "lowest"
    for members in groups.values():
        numbers = np.array([values[name] for name in members])
        frozen = np.array([shield.counts[name] > 0 for name in members])
        cut = _cut(numbers, frozen, lowest)
        for name, number, yes in zip(members, numbers, frozen, strict=True):
            views[name] = ScoreView(np.array([number]), np.array([yes]), *cut, lowest)
    return views


def _order(matrix: Matrix) -> tuple[float, int, str]:
    """Embedding, the layers, then final norm and head; in a layer by kind."""
    outside = -1 if matrix.kind == "embedding" else math.inf
    return (outside if matrix.layer is None else matrix.layer, KINDS.index(matrix.kind), matrix.name)


def _render_head(console: Console, inspection: Inspection) -> None:
    shield, realised = inspection.shield, inspection.shield.realised()
    ratio = "" if shield.ratio is None else f", ratio {shield.ratio:g}"
    console.print(
        f"[bold]{shield.model}[/]: {shield.method}, score {shield.score}, by {shield.granularity},"
        f" budget {shield.budget}{ratio}; model {shield.fingerprint[:12]}, calibration {shield.calibration[:12]}",
        highlight=False,
    )
    if shield.made:
        parts = ", ".join(f"{part['method']} ({part['score']}, {part['ratio']})" for part in shield.made["of"])
        console.print(f"{shield.made['operation']} of {parts}", highlight=False)
    linear = realised["linear"]
    console.print(
        f"frozen: {linear['frozen']:,} of {linear['elements']:,} elements of the layers' linear weights"
        f" ({linear['ratio']:.2%}); {realised['all']['frozen']:,} in all",
        highlight=False,
    )


def _matrix_table(inspection: Inspection, views: Sequence[MatrixView]) -> Table:
    """A line per matrix, layers set apart."""
    table = Table(header_style="bold", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("matrix", no_wrap=True)
    for heading in ("frozen", "of", "fraction"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("by", no_wrap=True)
    if inspection.score:
        for heading in ("score least", "greatest", "cut", "margin"):
            table.add_column(heading, justify="right", no_wrap=True)
    if inspection.other is not None:
        for heading in ("Jaccard", "shared"):
            table.add_column(heading, justify="right", no_wrap=True)
    before: int | str | None = "none yet"
    for view in views:
        layer = view.matrix.layer
        if before not in ("none yet", layer):
            table.add_section()
        label = view.matrix.kind + (f" ({view.experts} experts)" if view.experts > 1 else "")
        if len(view.matrix.shape) == 1:  # a layer has several norms and biases
            label = ".".join(view.matrix.name.removesuffix(".weight").split(".")[-1 if view.matrix.is_norm else -2 :])
        cells = [f"{view.frozen_units:,}", f"{view.units:,}", f"{view.ratio:.2%}", view.granularity]
        if inspection.score:
            cells += _score_cells(view.scores)
        if view.overlap is not None:
            cells += [f"{view.overlap.jaccard:.3f}", f"{view.overlap.share:.1%}"]
        table.add_row("" if layer in (before, None) else str(layer), label, *cells)
        before = layer
    return table


def _score_cells(view: ScoreView | None) -> list[str]:
    if view is None or not view.values.size:
        return ["-"] * 4
    cut = "-" if view.last_frozen is None else f"{view.last_frozen:.4g}"
    margin = "-" if view.margin is None else f"{view.margin:.2g}"
    return [f"{view.values.min():.3g}", f"{view.values.max():.3g}", cut, margin]


def _kind_table(inspection: Inspection) -> Table:
    """Per kind: the range of fractions, margins and overlaps over the layers."""
    table = Table(
        header_style="bold",
        box=SIMPLE,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title="by kind, over all layers",
        title_justify="left",
    )
    table.add_column("kind")
    for heading in ("matrices", "frozen fraction", "least", "greatest"):
        table.add_column(heading, justify="right", no_wrap=True)
    if inspection.score:
        table.add_column("least margin", justify="right", no_wrap=True)
    if inspection.other is not None:
        for heading in ("Jaccard", "least", "greatest"):
            table.add_column(heading, justify="right", no_wrap=True)
    for kind in inspection.kinds():
        views = [v for v in inspection.views if v.matrix.kind == kind]
        frozen = sum(inspection.shield.counts[v.matrix.name] for v in views)
        share = frozen / sum(v.matrix.elements for v in views)
        cells = [str(len(views)), f"{share:.2%}", f"{min(v.ratio for v in views):.2%}"]
        cells.append(f"{max(v.ratio for v in views):.2%}")
        if inspection.score:
            margins = [v.scores.margin for v in views if v.scores is not None and v.scores.margin is not None]
            cells.append(f"{min(margins):.2g}" if margins else "-")
        overlaps = [v.overlap for v in views if v.overlap is not None]
        if overlaps:
            whole = Overlap(*(sum(getattr(o, key) for o in overlaps) for key in ("both", "ours", "theirs")))
            jaccards = [o.jaccard for o in overlaps]
            cells += [f"{whole.jaccard:.3f}", f"{min(jaccards):.3f}", f"{max(jaccards):.3f}"]
        table.add_row(kind, *cells)
    return table


def _to_dict(view: MatrixView) -> dict[str, Any]:
    result: dict[str, Any] = {
        "name": view.matrix.name,
        "layer": view.matrix.layer,
        "kind": view.matrix.kind,
        "granularity": view.granularity,
        "units": view.units,
        "frozen_units": view.frozen_units,
        "frozen_share": view.ratio,
    }
    if view.scores is not None and view.scores.values.size:
        result["score_least"] = float(view.scores.values.min())
        result["score_greatest"] = float(view.scores.values.max())
        result["last_frozen"] = view.scores.last_frozen
        result["first_trainable"] = view.scores.first_trainable
        result["margin"] = view.scores.margin
    if view.overlap is not None:
        result["jaccard"], result["shared"] = view.overlap.jaccard, view.overlap.share
    return result
