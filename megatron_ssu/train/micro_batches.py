"""Micro-batches through model chunks: how they are read, and megatron's schedule over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_ssu.config.schema import RunConfig
from megatron_ssu.config.sources import isolates
from megatron_ssu.engine.device import local_device
from megatron_ssu.models.build import has_transformer_engine

Batch = dict[str, Tensor]


def read_batch(iterator: Iterator[Batch], run: RunConfig) -> Batch:
    """The next micro-batch on this rank's device; under context parallelism this rank's part of its sequences.

    Where documents do not attend to each other it has, for megatron's own attention, `attention_mask` bool [b, 1, s, s], True
    where nothing is seen; for Transformer Engine's its sequences are joined, [1, b * s], and `cu_seqlens` int32 says where
    documents begin and end.
    """
    batch, where = next(iterator), local_device()
    if not isolates(run):
        return get_batch_on_this_cp_rank({key: value.to(where, non_blocking=True) for key, value in batch.items()})
    batch = _joined(batch) if has_transformer_engine() else {**batch, "attention_mask": unseen(batch["position_ids"])}
    return {key: value.to(where, non_blocking=True) for key, value in batch.items()}


def unseen(positions: Tensor) -> Tensor:
    """bool [b, 1, s, s]: True where position i does not see position j: later ones, and those of other documents.

    positions: int64 [b, s], 0 where a document begins.
    """
    document = (positions == 0).cumsum(dim=1)
    later = torch.ones(positions.shape[1], positions.shape[1], dtype=torch.bool).triu(1)
    return (later | (document[:, :, None] != document[:, None, :]))[:, None]


def _joined(batch: Batch) -> Batch:
    starts = (batch["position_ids"].reshape(-1) == 0).nonzero().view(-1).to(torch.int32)
    tokens = batch["position_ids"].numel()
    ends = torch.cat([starts, torch.tensor([tokens], dtype=torch.int32)])
    return {**{key: value.reshape(1, -1) for key, value in batch.items()}, "cu_seqlens": ends}


def run_chunk(chunk: torch.nn.Module, batch: Batch, labels: Tensor | None = None) -> Tensor:
    """A micro-batch through a model chunk: logits [b, s, V / TP], with labels losses [b, s]; before the last, hidden states."""
    packed = None
    if (ends := batch.get("cu_seqlens")) is not None:
        longest = int(batch["position_ids"].max()) + 1
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
        )
    output: Tensor = chunk(
        batch["tokens"],
        batch["position_ids"],
        batch.get("attention_mask"),
        labels=labels,
        **({} if packed is None else {"packed_seq_params": packed}),
    )
    return output


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
    length, micro = run.data.sequence_length, run.train.micro_batch_size
    if isolates(run) and has_transformer_engine():
        length, micro = length * micro, 1
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches,
        model=list(chunks) if run.parallel.virtual_pipeline else chunks[0],
        num_microbatches=count,
        seq_length=length,
        micro_batch_size=micro,
        forward_only=forward_only,
        collect_non_loss_data=collect,
    )
