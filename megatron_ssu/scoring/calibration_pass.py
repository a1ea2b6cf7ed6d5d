"""A pass over calibration data on a mesh: forward, and backward where a score needs gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ssu.data.calibration import Calibration
from megatron_ssu.engine.device import local_device
from megatron_ssu.models.parallel_model import ParallelModel
from megatron_ssu.scoring.input_statistics import InputStatistics


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
    """This data-parallel rank's part, in micro-batches of `size` rows, filled up with masked rows.

    All ranks get as many: those of a pipeline run them together, and so do ranks that share experts. The interleaved schedule
    needs a multiple of the pipeline's length. Sequence parallelism needs rows that divide over its ranks: masked tokens are
    appended.
    """
    mesh, where = session.mesh, local_device()
    tokens, mask = calibration.tokens[mesh.data_rank :: mesh.data], calibration.mask[mesh.data_rank :: mesh.data]
    unit = size * (mesh.pipeline if mesh.virtual else 1)
    most = -(-calibration.tokens.shape[0] // mesh.data)  # rows of the rank that has most
    missing = most + -most % unit - tokens.shape[0]
    after = -tokens.shape[1] % mesh.tensor if session.config.sequence_parallel else 0
    tokens = torch.nn.functional.pad(tokens, (0, after, 0, missing))
    mask = torch.nn.functional.pad(mask, (0, after, 0, missing))
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
    """Run all micro-batches forward through the pipeline, and backward if `backward`; `statistics` get each one's mask.

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
