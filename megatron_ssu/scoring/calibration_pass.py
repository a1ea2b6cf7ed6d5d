"""Score a sharded model: one pass over calibration data, each rank its own shards, one result for every mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ssu.data.calibration import Calibration
from megatron_ssu.engine.device import local_device
from megatron_ssu.engine.ranks import on_all_ranks
from megatron_ssu.errors import UserError
from megatron_ssu.models.layout import LocalParam, Piece, take
from megatron_ssu.models.parallel_model import ParallelModel
from megatron_ssu.scoring import base
from megatron_ssu.scoring.fisher import FISHER, SquaredGradients
from megatron_ssu.scoring.gather import Entry, add_tensor_ranks, spread_columns, spread_rows
from megatron_ssu.scoring.input_statistics import InputStatistics
from megatron_ssu.scoring.scores_file import Scores


@dataclass(frozen=True)
class MicroBatch:
    """Calibration rows of one micro-batch on this rank's device."""

    tokens: Tensor  # int64 [b, s]
    positions: Tensor  # int64 [b, s]
    mask: Tensor | None  # bool [b, s]; None: every token is real

    def labels(self) -> tuple[Tensor, Tensor]:
        """The next token, int64 [b, s], and where it is real, bool [b, s]."""
        real = torch.ones_like(self.tokens, dtype=torch.bool) if self.mask is None else self.mask
        next_real = real & real.roll(-1, 1)
        next_real[:, -1] = False
        return self.tokens.roll(-1, 1), next_real


def micro_batches(calibration: Calibration, session: ParallelModel, size: int) -> list[MicroBatch]:
    """This data-parallel rank's share, in micro-batches of `size` rows, filled up with masked rows.

    All ranks of a pipeline get as many; the interleaved schedule needs a multiple of the pipeline's length. Sequence
    parallelism needs rows that divide over its ranks: masked tokens are appended.
    """
    mesh, where = session.mesh, local_device()
    tokens, mask = calibration.tokens[mesh.data_rank :: mesh.data], calibration.mask[mesh.data_rank :: mesh.data]
    unit = size * (mesh.pipeline if mesh.virtual else 1)
    missing = -tokens.shape[0] % unit if tokens.shape[0] else unit
    behind = -tokens.shape[1] % mesh.tensor if session.config.sequence_parallel else 0
    tokens = torch.nn.functional.pad(tokens, (0, behind, 0, missing))
    mask = torch.nn.functional.pad(mask, (0, behind, 0, missing))
    positions = torch.arange(tokens.shape[1], device=where).expand(size, -1)
    batches = []
    for first in range(0, tokens.shape[0], size):
        part = mask[first : first + size]
        batches.append(
            MicroBatch(tokens[first : first + size].to(where), positions, None if part.all() else part.to(where))
        )
    return batches


@contextmanager
def _unquantized(config: Any) -> Iterator[None]:
    """While it lasts, megatron's layers, which all share `config`, compute without FP8 and FP4."""
    kept = config.fp8, config.fp4
    config.fp8 = config.fp4 = None
    try:
        yield
    finally:
        config.fp8, config.fp4 = kept


def calibration_pass(
    session: ParallelModel, batches: list[MicroBatch], statistics: InputStatistics | None, *, backward: bool = False
) -> None:
    """Run all micro-batches forward through the pipeline, with `backward` also back; `statistics` are told each one's mask.

    Runs in the model's own dtype even where precision.fp8 or fp4 is set: scores must not depend on quantisation, and with
    delayed scaling the first micro-batches would be quantised with scales that fit nothing. Backward starts at each
    micro-batch's mean loss, not divided by their number.
    """

    def loss(batch: MicroBatch) -> Callable[[Tensor], tuple[Tensor, Any]]:
        def of(losses: Tensor) -> tuple[Tensor, Any]:
            weights = batch.labels()[1].float()
            mean = (losses.float() * weights).sum() / weights.sum().clamp(min=1)
            return mean * len(batches), {}  # the schedule divides by the number of micro-batches

        return of

    def forward_step(iterator: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(iterator)
        if statistics is not None:
            statistics.begin(chunk, batch.mask)
        if backward:
            labels = batch.labels()[0] if chunk.post_process else None
            return chunk(batch.tokens, batch.positions, None, labels=labels), loss(batch)
        output = chunk(batch.tokens, batch.positions, None)
        return output, lambda out: (torch.zeros((), device=out.device), {})

    for chunk in session.chunks:
        chunk.eval()
    virtual = session.mesh.virtual
    with torch.set_grad_enabled(backward), _unquantized(session.config):
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in session.chunks] if virtual else iter(batches),
            model=session.chunks if virtual else session.chunks[0],
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.shape[1],
            micro_batch_size=batches[0].tokens.shape[0],
            forward_only=not backward,
        )
    for chunk in session.chunks:
        chunk.train()


def score_model(
    session: ParallelModel, names: list[str], calibration: Calibration | None, fingerprint: str
) -> Scores | None:
    """Compute `names` over one pass; the result is on rank 0, None elsewhere. Collective over all ranks.

    Raises:
        UserError: unknown score, no calibration where one is needed, NaN or infinite weights, activations or gradients.
    """
    base.check_names(names)
    if session.mesh.context > 1:
        raise UserError(
            f"parallel.context_parallel_size: {session.mesh.context}; scoring runs without context parallelism: "
            "score with 1, any other mesh can use the scores file"
        )
    norms = session.run.shield.norms == "half"
    needed = base.needs_calibration(names) or norms
    if needed and calibration is None:
        why = f"the score {names[0]}" if base.needs_calibration(names) else "shield.norms: half"
        raise UserError(f"shield.calibration.path: needed for {why}; name a file of source chats")
    on_all_ranks(lambda: _check_weights(session))
    found: dict[str, dict[str, Tensor]] = {}
    mine: list[Entry] = []
    if needed and calibration is not None:
        found, mine = _measure(session, names, calibration, norms)
    mine += _own_scores(session, names, found)
    gathered: list[Any] = [None] * session.mesh.world if session.mesh.rank == 0 else []
    dist.gather_object(mine, gathered or None, dst=0)
    if session.mesh.rank != 0:
        return None
    matrices = {m.name: m for m in session.source.family.matrices(session.source.dims)}
    tensors: dict[str, np.ndarray] = {}
    for key, start, length, values in (entry for part in gathered for entry in part):
        tensors.setdefault(key, np.zeros(length, dtype=np.float64))[start : start + len(values)] = values
    used = calibration if needed else None
    return Scores(
        model=session.source.name,
        fingerprint=fingerprint,
        matrices=matrices,
        tensors=tensors,
        scores=sorted(names),
        calibration=used.digest if used else "none",
        samples=used.n_samples if used else 0,
        tokens=int(used.mask.sum()) if used else 0,
    )


def _measure(
    session: ParallelModel, names: list[str], calibration: Calibration, norms: bool
) -> tuple[dict[str, dict[str, Tensor]], list[Entry]]:
    """One pass over the calibration data: statistics of the inputs by parameter, and the entries of gradient scores."""
    rows = calibration.tokens.shape[0]
    statistics, gradients = InputStatistics(session, norms=norms), None
    size = min(session.run.shield.calibration.micro_batch_size, rows)
    if FISHER in names:
        gradients, size = SquaredGradients(session), 1
    try:
        batches = micro_batches(calibration, session, size)
        calibration_pass(session, batches, statistics, backward=gradients is not None)
    finally:
        statistics.close()
        if gradients is not None:
            gradients.close()
    found = statistics.merge(rows)
    on_all_ranks(lambda: statistics.check(found))
    if gradients is None:
        return found, []
    entries = gradients.entries(rows)
    on_all_ranks(gradients.check)
    return found, entries


def _check_weights(session: ParallelModel) -> None:
    for local in session.layout:
        for piece in local.pieces:
            if not torch.isfinite(take(local.param.detach(), piece)).all():
                raise UserError(f"{piece.matrix.name}: holds NaN or infinite weights; look for a broken checkpoint")


def _own_scores(session: ParallelModel, names: list[str], found: dict[str, dict[str, Tensor]]) -> list[Entry]:
    """Entries of the scores that are made of weights and input statistics, and of those statistics."""
    entries: list[Entry] = []
    scores = [base.SCORES[n] for n in names if n in base.SCORES]
    for local in session.layout:
        if not local.pieces or not local.primary:
            continue
        statistics = found.get(local.pieces[0].matrix.name, {})
        for piece in local.pieces:
            entries += spread_columns(session, local, piece, statistics)
            if piece.matrix.scored and scores:
                entries += _piece_scores(session, local, piece, scores, statistics)
    return entries


def _piece_scores(
    session: ParallelModel,
    local: LocalParam,
    piece: Piece,
    scores: list[base.ElementScore],
    statistics: dict[str, Tensor],
) -> list[Entry]:
    """Scores of one matrix by column and by row."""
    weight = take(local.param.detach(), piece).double().abs_()
    columns: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for score in scores:
        x = statistics[score.statistic] if score.statistic else torch.ones_like(weight[0])
        sums, row = score.term(weight).sum(0), score.row_term(weight, x).sum(1)
        add_tensor_ranks(session, local, sums, row)
        columns[score.name], rows[score.name] = score.finish(sums, x), row
    return spread_columns(session, local, piece, columns) + spread_rows(session, local, piece, rows)
