"""Score a sharded model: each rank its own shards, one result for every mesh.

Passes over calibration data are made first; then every rank sums its shards, rank 0 gathers the sums of whole matrices and
finishes the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ssu.data.calibration import Calibration
from megatron_ssu.engine.device import local_device
from megatron_ssu.engine.ranks import on_all_ranks
from megatron_ssu.errors import UserError
from megatron_ssu.models.hf_files import HFCheckpoint
from megatron_ssu.models.hub import model_name
from megatron_ssu.models.layout import LocalParam, Piece, take
from megatron_ssu.models.matrix import Matrix
from megatron_ssu.models.parallel_model import ParallelModel
from megatron_ssu.scoring import registry
from megatron_ssu.scoring.base import GradientPass, Score, Summed, Whole
from megatron_ssu.scoring.calibration_pass import calibration_pass, micro_batches
from megatron_ssu.scoring.gather import (
    Entry,
    add_all_tensor_ranks,
    add_tensor_ranks,
    spread_columns,
    spread_matrix,
    spread_rows,
)
from megatron_ssu.scoring.input_statistics import InputStatistics
from megatron_ssu.scoring.scores_file import INPUT_NORM, TARGET_INPUT_NORM, Scores, axis_units


@dataclass(frozen=True)
class Before:
    """The checkpoint that `change` scores compare with; see change.open_before."""

    checkpoint: HFCheckpoint
    fingerprint: str  # see models/fingerprint.py


Statistics = dict[str, dict[str, Tensor]]  # first matrix of each parameter -> statistic -> float64 [I of the shard]


def score_model(
    session: ParallelModel,
    names: list[str],
    calibration: Calibration | None,
    fingerprint: str,
    *,
    target: Calibration | None = None,
    before: Before | None = None,
) -> Scores | None:
    """Compute `names`; the result is on rank 0, None elsewhere. Collective over all ranks.

    Args:
        calibration: source samples, for scores that need a pass over them, and for the statistics of norms.
        target: target text, for scores that need a second pass.
        before: the checkpoint that scores of change compare with.

    Raises:
        UserError: an unknown score, one without what it needs, NaN or infinite weights, activations or gradients.
    """
    scores = [registry.score_named(name) for name in names]
    norms = session.run.shield.measures_norms
    used = calibration if norms or registry.needing_calibration(names) else None
    _check_needs(session, names, norms, calibration, target, before)
    on_all_ranks(lambda: _check_weights(session))
    statistics: Statistics = {}
    entries: list[Entry] = []
    if used is not None:
        makers = [score.gradients for score in scores if score.gradients is not None]
        size = session.run.shield.calibration.micro_batch_size
        statistics, entries = _measure(session, used, size, makers, norms=norms)
    if target is not None and registry.needing_target(names):
        size = session.run.shield.target_calibration.micro_batch_size
        _add_target(statistics, _measure(session, target, size)[0])
    else:
        target = None
    if not registry.needing_change(names):
        before = None
    entries += _sums(session, scores, statistics, before)
    entries += _whole_matrices(session, scores)
    gathered: list[Any] = [None] * session.mesh.world if session.mesh.rank == 0 else []
    dist.gather_object(entries, gathered or None, dst=0)
    if session.mesh.rank != 0:
        return None
    matrices = {m.name: m for m in session.source.family.matrices(session.source.dims)}
    return Scores(
        model=session.source.name,
        fingerprint=fingerprint,
        matrices=matrices,
        tensors=_finish(scores, matrices, _joined(entry for part in gathered for entry in part)),
        scores=sorted(names),
        calibration=used.digest if used else "none",
        samples=used.n_samples if used else 0,
        tokens=int(used.mask.sum()) if used else 0,
        settings=_settings(target, before),
    )


def _check_needs(
    session: ParallelModel,
    names: Sequence[str],
    norms: bool,
    calibration: Calibration | None,
    target: Calibration | None,
    before: Before | None,
) -> None:
    """Raises UserError where something that a score needs is not there."""
    if session.mesh.context > 1:
        raise UserError(
            f"parallel.context_parallel_size: {session.mesh.context}; scoring runs without context parallelism: "
            "score with 1, any other mesh can use the scores file"
        )
    registry.check_experts(names, session.source.family.matrices(session.source.dims))
    measured = [f"the score {name}" for name in registry.needing_calibration(names)]
    if norms:
        measured.append(f"shield.norms: {session.run.shield.norms}")
    if measured and calibration is None:
        raise UserError(f"shield.calibration.path: needed for {measured[0]}; name a file of source chats")
    for needing, there, key, what in (
        (registry.needing_target(names), target, "shield.target_calibration.path", "a file of target text"),
        (registry.needing_change(names), before, "shield.change_from", "the checkpoint to compare with"),
    ):
        if needing and there is None:
            raise UserError(f"{key}: needed for the score {needing[0]}; name {what}")


def _settings(target: Calibration | None, before: Before | None) -> dict[str, Any]:
    """What else the scores depend on, for the file's header."""
    settings: dict[str, Any] = {}
    if target is not None:
        settings["target_calibration"] = {
            "digest": target.digest,
            "samples": target.n_samples,
            "tokens": int(target.mask.sum()),
        }
    if before is not None:
        name = model_name(before.checkpoint.directory)
        settings["change_from"] = {"model": name, "fingerprint": before.fingerprint}
    return settings


def _measure(
    session: ParallelModel,
    calibration: Calibration,
    size: int,
    makers: Sequence[Callable[[ParallelModel], GradientPass]] = (),
    *,
    norms: bool = False,
) -> tuple[Statistics, list[Entry]]:
    """One pass over the calibration data: statistics of the inputs by parameter, and the entries of the gradient scores that
    `makers` make. `size`: rows per micro-batch; with gradients it is 1."""
    rows = calibration.tokens.shape[0]
    statistics, watching = InputStatistics(session, norms=norms), []
    try:
        watching = [make(session) for make in makers]
        batches = micro_batches(calibration, session, 1 if makers else min(size, rows))
        calibration_pass(session, batches, statistics, backward=bool(watching))
    finally:
        statistics.close()
        for gradients in watching:
            gradients.close()
    found = statistics.merge(rows)
    entries: list[Entry] = []
    on_all_ranks(lambda: statistics.check(found))
    for gradients in watching:
        entries += gradients.entries(rows)
        on_all_ranks(gradients.check)
    return found, entries


def _add_target(statistics: Statistics, target: Statistics) -> None:
    for name, found in target.items():
        statistics[name][TARGET_INPUT_NORM] = found[INPUT_NORM]


def _check_weights(session: ParallelModel) -> None:
    for local in session.layout:
        for piece in local.pieces:
            if not torch.isfinite(take(local.param.detach(), piece)).all():
                raise UserError(f"{piece.matrix.name}: holds NaN or infinite weights; look for a broken checkpoint")


def _sums(
    session: ParallelModel, scores: Sequence[Score], statistics: Statistics, before: Before | None
) -> list[Entry]:
    """This rank's entries of the input statistics, and of the sums that scores are finished from."""
    entries: list[Entry] = []
    broken: list[str] = []
    for local in session.layout:
        if not local.pieces or not local.primary:
            continue
        mine = scores if session.mesh.first_replica(expert=local.expert) else ()  # the others hold the same weights
        of_weights = [score for score in mine if score.needs in ("weights", "forward")]
        of_change = [score for score in mine if score.needs == "change"]
        found = statistics.get(local.matrices[0].name, {})
        for piece in local.parts:
            entries += spread_columns(session, local, piece, found)
            if not piece.matrix.scored:
                continue
            weight = take(local.param.detach(), piece)
            if of_weights:
                magnitude = weight.double().abs_()
                for score in of_weights:
                    inputs = [found[name] for name in score.statistics]
                    entries += _piece_sums(session, local, piece, score, magnitude, inputs)
            if of_change and before is not None:
                old = before.checkpoint.get_slice(piece.matrix.name)[piece.index].to(weight.device).double()
                moved = (weight.double() - old).abs_()
                if not torch.isfinite(moved).all():
                    broken.append(f"{before.checkpoint.directory}: {piece.matrix.name}")
                for score in of_change:
                    entries += _piece_sums(session, local, piece, score, moved, [old.abs()])
    on_all_ranks(lambda: _refuse_broken(broken))
    return entries


def _refuse_broken(weights: Sequence[str]) -> None:
    if weights:
        raise UserError(f"{weights[0]}: holds NaN or infinite weights; look for a broken checkpoint")


def _piece_sums(
    session: ParallelModel, local: LocalParam, piece: Piece, score: Score, w: Tensor, inputs: Sequence[Tensor]
) -> list[Entry]:
    """Entries of the sums of one score over one matrix. w float64 [O, I] of the shard; `inputs` as base.py says."""

    def summed(term: Callable[..., Tensor], dim: int | None) -> Tensor:
        values = term(w, *inputs).expand_as(w)
        return values.sum().reshape(1) if dim is None else values.sum(dim)

    entries: list[Entry] = []
    for number, term in enumerate(score.column.terms if score.column else ()):
        columns = summed(term, 0)
        add_tensor_ranks(session, local, columns, w.new_zeros(0))
        entries += spread_columns(session, local, piece, {_sum_name(score, number): columns})
    for number, term in enumerate(score.row.terms if score.row else ()):
        rows = summed(term, 1)
        add_tensor_ranks(session, local, w.new_zeros(0), rows)
        entries += spread_rows(session, local, piece, {_sum_name(score, number): rows})
    for number, term in enumerate(score.matrix.terms if isinstance(score.matrix, Summed) else ()):
        whole = summed(term, None)
        add_all_tensor_ranks(session, local, whole)
        entries += spread_matrix(session, local, piece, {_sum_name(score, number): whole})
    return entries


def _sum_name(score: Score, number: int) -> str:
    """What a sum is called until its score is finished."""
    return f"{score.name}:{number}"


def _whole_matrices(session: ParallelModel, scores: Sequence[Score]) -> list[Entry]:
    """Entries of the scores of whole matrices. Ranks share the matrices out and read them from the model's files."""
    wanted = [(score.name, score.matrix) for score in scores if isinstance(score.matrix, Whole)]
    if not wanted:
        return []
    matrices = [m for m in session.source.family.matrices(session.source.dims) if m.scored]
    matrices.sort(key=lambda m: (-m.elements * min(m.shape), m.name))  # a decomposition's cost
    entries: list[Entry] = []
    for matrix in matrices[session.mesh.rank :: session.mesh.world]:
        weight = session.source.checkpoint.get(matrix.name).to(local_device(), torch.float32)
        for name, term in wanted:
            entries.append((f"{name}/matrix/{matrix.name}", 0, 1, np.array([term.of(weight)])))
    return entries


def _joined(entries: Iterable[Entry]) -> dict[str, np.ndarray]:
    """Whole tensors, float64, of the entries of all ranks."""
    tensors: dict[str, np.ndarray] = {}
    for key, start, length, values in entries:
        tensors.setdefault(key, np.zeros(length, dtype=np.float64))[start : start + len(values)] = values
    return tensors


def _finish(
    scores: Sequence[Score], matrices: Mapping[str, Matrix], tensors: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Replace the sums among `tensors` by the scores that are finished from them."""
    for score in scores:
        if score.needs in ("seed", "backward"):
            continue
        for matrix in (m for m in matrices.values() if m.scored):
            for axis, term in (("column", score.column), ("row", score.row), ("matrix", score.matrix)):
                if not isinstance(term, Summed):
                    continue
                keys = [f"{_sum_name(score, number)}/{axis}/{matrix.name}" for number in range(len(term.terms))]
                inputs = [tensors.pop(key) for key in keys]
                if axis == "column":
                    inputs += [tensors[f"{name}/column/{matrix.name}"] for name in score.statistics]
                values = np.array(term.finish(*inputs))
                assert values.shape == (axis_units(axis, matrix.shape),)
                tensors[f"{score.name}/{axis}/{matrix.name}"] = values
    return tensors
