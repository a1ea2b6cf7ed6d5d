"""Score a sharded model: one forward pass over calibration data, each rank its own shards, one result for every mesh."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ssu import runtime
from megatron_ssu.data.chat import Calibration
from megatron_ssu.errors import UserError
from megatron_ssu.models.layout import LocalParam, Piece, take
from megatron_ssu.scoring import base
from megatron_ssu.scoring.file import Scores
from megatron_ssu.scoring.inputs import InputStatistics
from megatron_ssu.session import Session


@dataclass(frozen=True)
class MicroBatch:
    """Calibration rows of one micro-batch on this rank's device."""

    tokens: Tensor  # int64 [b, s]
    positions: Tensor  # int64 [b, s]
    mask: Tensor | None  # bool [b, s]; None: every token is real


def micro_batches(calibration: Calibration, session: Session, size: int) -> list[MicroBatch]:
    """This data-parallel rank's share, in micro-batches of `size` rows, filled up with masked rows.

    All ranks of a pipeline get as many; the interleaved schedule needs a multiple of the pipeline's length.
    """
    mesh, where = session.mesh, runtime.device()
    tokens, mask = calibration.tokens[mesh.data_rank :: mesh.data], calibration.mask[mesh.data_rank :: mesh.data]
    unit = size * (mesh.pipeline if mesh.virtual else 1)
    missing = -tokens.shape[0] % unit if tokens.shape[0] else unit
    tokens = torch.nn.functional.pad(tokens, (0, 0, 0, missing))
    mask = torch.nn.functional.pad(mask, (0, 0, 0, missing))
    positions = torch.arange(tokens.shape[1], device=where).expand(size, -1)
    batches = []
    for first in range(0, tokens.shape[0], size):
        part = mask[first : first + size]
        batches.append(
            MicroBatch(tokens[first : first + size].to(where), positions, None if part.all() else part.to(where))
        )
    return batches


def forward_pass(session: Session, batches: list[MicroBatch], statistics: InputStatistics | None) -> None:
    """Run all micro-batches forward through the pipeline; `statistics` hooks see each one's mask."""

    def forward_step(iterator: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(iterator)
        if statistics is not None:
            statistics.tokens.mask = batch.mask
        output = chunk(batch.tokens, batch.positions, None)
        return output, lambda out: (torch.zeros((), device=out.device), {})

    for chunk in session.chunks:
        chunk.eval()
    virtual = session.mesh.virtual
    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in session.chunks] if virtual else iter(batches),
            model=session.chunks if virtual else session.chunks[0],
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.shape[1],
            micro_batch_size=batches[0].tokens.shape[0],
            forward_only=True,
        )
    for chunk in session.chunks:
        chunk.train()


def score_model(session: Session, names: list[str], calibration: Calibration | None, fingerprint: str) -> Scores | None:
    """Compute `names` over one forward pass; the result is on rank 0, None elsewhere. Collective over all ranks.

    Raises:
        UserError: unknown score, no calibration where one is needed, NaN or infinite activations or weights.
    """
    base.check_names(names)
    found: dict[str, dict[str, Tensor]] = {}
    if base.needs_calibration(names):
        if calibration is None:
            raise UserError(f"shield.calibration.path: needed for the score {names[0]}; name a file of source chats")
        found = _statistics(session, calibration)
    runtime.on_all_ranks(lambda: _check_weights(session))
    mine = _own_scores(session, names, found)
    if "fisher" in names:
        from megatron_ssu.scoring.fisher import fisher_scores

        mine += fisher_scores(session, calibration)
    gathered: list[Any] = [None] * session.mesh.world if session.mesh.rank == 0 else []
    dist.gather_object(mine, gathered or None, dst=0)
    if session.mesh.rank != 0:
        return None
    matrices = {m.name: m for m in session.source.family.matrices(session.source.dims)}
    tensors: dict[str, np.ndarray] = {}
    for key, start, length, values in (entry for part in gathered for entry in part):
        tensors.setdefault(key, np.zeros(length, dtype=np.float64))[start : start + len(values)] = values
    return Scores(
        model=session.source.name,
        fingerprint=fingerprint,
        matrices=matrices,
        tensors=tensors,
        scores=sorted(names),
        calibration=calibration.digest if found and calibration else "none",
        samples=calibration.n_samples if found and calibration else 0,
        tokens=int(calibration.mask.sum()) if found and calibration else 0,
    )


def _statistics(session: Session, calibration: Calibration) -> dict[str, dict[str, Tensor]]:
    statistics = InputStatistics(session)
    size = min(session.run.shield.calibration.micro_batch_size, calibration.tokens.shape[0])
    forward_pass(session, micro_batches(calibration, session, size), statistics)
    statistics.close()
    found = statistics.merge(calibration.tokens.shape[0])
    runtime.on_all_ranks(lambda: statistics.check(found))
    return found


Entry = tuple[str, int, int, np.ndarray]  # key, first index, whole length, values


def _check_weights(session: Session) -> None:
    for local in session.layout:
        for piece in local.pieces:
            if not torch.isfinite(take(local.param.detach(), piece)).all():
                raise UserError(f"{piece.matrix.name}: holds NaN or infinite weights; look for a broken checkpoint")


def _own_scores(session: Session, names: list[str], found: dict[str, dict[str, Tensor]]) -> list[Entry]:
    """What this rank contributes: values that no other rank sends."""
    entries: list[Entry] = []
    scores = [base.SCORES[n] for n in names if n in base.SCORES]
    for local in session.layout:
        if not local.pieces or not local.pieces[0].matrix.scored:
            continue
        statistics = found.get(local.pieces[0].matrix.name, {})
        for piece in local.pieces:
            weight = take(local.param.detach(), piece).double().abs()
            entries += _piece_scores(session, local, piece, weight, scores, statistics)
    return entries if session.mesh.data_rank == 0 and session.mesh.context_rank == 0 else []


def _piece_scores(
    session: Session,
    local: LocalParam,
    piece: Piece,
    weight: Tensor,
    scores: list[base.ElementScore],
    statistics: dict[str, Tensor],
) -> list[Entry]:
    """Scores and statistics of one matrix; sums over rows or columns that tensor parallelism splits are reduced."""
    name, (rows, cols) = piece.matrix.name, piece.matrix.shape
    columns: dict[str, Tensor] = dict(statistics)
    by_row: dict[str, Tensor] = {}
    for score in scores:
        x = statistics[score.statistic] if score.statistic else torch.ones_like(weight[0])
        sums = score.term(weight).sum(0)
        row = score.row_term(weight, x).sum(1)
        if session.mesh.tensor > 1:
            dist.all_reduce(sums if local.split == 0 else row, group=parallel_state.get_tensor_model_parallel_group())
        columns[score.name], by_row[score.name] = score.finish(sums, x), row
    first = session.mesh.tensor_rank == 0
    entries: list[Entry] = []
    if local.split == 1 or first:
        entries += [(f"{k}/column/{name}", piece.col_start, cols, v.cpu().numpy()) for k, v in columns.items()]
    if local.split == 0 or first:
        entries += [(f"{k}/row/{name}", piece.row_start, rows, v.cpu().numpy()) for k, v in by_row.items()]
    return entries
