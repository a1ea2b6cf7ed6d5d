"""Micro-batches through model chunks: how they are read, and megatron's schedule over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_ssu.config.schema import RunConfig
from megatron_ssu.engine.device import local_device

Batch = dict[str, Tensor]


def read_batch(iterator: Iterator[Batch]) -> Batch:
    """The next micro-batch on this rank's device; under context parallelism this rank's part of its sequences."""
    where = local_device()
    return get_batch_on_this_cp_rank({key: value.to(where, non_blocking=True) for key, value in next(iterator).items()})


def run_schedule(
    run: RunConfig,
    forward_step: Callable[[Iterator[Batch], torch.nn.Module], tuple[Tensor, Any]],
    chunks: Sequence[torch.nn.Module],
    batches: Iterator[Batch] | list,
    count: int,
    *,
    forward_only: bool,
    collect: bool = False,
) -> list[Any]:
    """`count` micro-batches through this rank's chunks; what their loss functions report, on the last stage.

    `batches`: a list of iterators, one a chunk, under virtual pipeline stages. With `collect` the loss functions, called with
    `non_loss_data=True`, return what is reported, and no loss.
    """
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches,
        model=list(chunks) if run.parallel.virtual_pipeline else chunks[0],
        num_microbatches=count,
        seq_length=run.data.sequence_length,
        micro_batch_size=run.train.micro_batch_size,
        forward_only=forward_only,
        collect_non_loss_data=collect,
    )
