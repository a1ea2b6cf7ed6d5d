"""Read a Hugging Face directory straight into the shards of a mesh.

A rank reads only the slices that it holds, and its data- and context-parallel replicas get them from it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ssu.errors import UserError
from megatron_ssu.io.dtypes import STORED_NAMES
from megatron_ssu.models.family import Dims, Family
from megatron_ssu.models.hf_files import HFCheckpoint, row_window
from megatron_ssu.models.layout import Layout, LocalParam, put
from megatron_ssu.models.matrix import Matrix

BUCKET = 1 << 26  # bytes of parameters that are broadcast together; larger ones go alone

DTYPE_NAMES: dict[str, torch.dtype] = {stored: getattr(torch, name) for stored, name in STORED_NAMES.items()}


def check_checkpoint(checkpoint: HFCheckpoint, family: Family, dims: Dims, dtype: torch.dtype) -> None:
    """Names, shapes and dtypes of all tensors, before any weight is read.

    Raises:
        UserError: a tensor is missing, unknown, of another shape, or would lose bits in `dtype`.
    """
    names = set(checkpoint.names())
    expected: dict[str, int] = {}  # tensor -> rows of its matrices
    for matrix in family.matrices(dims):
        tensor, _ = row_window(matrix.name)
        if tensor not in names:
            raise UserError(f"{checkpoint.directory}: tensor {tensor} is missing; config.json says the model has it")
        _check_tensor(checkpoint, matrix, dtype)
        expected[tensor] = expected.get(tensor, 0) + matrix.shape[0]
    for tensor, rows in expected.items():
        if checkpoint.shape(tensor)[0] != rows:
            raise UserError(
                f"{checkpoint.directory}: tensor {tensor} has {checkpoint.shape(tensor)[0]} rows, config.json says {rows}"
            )
    heads = {t for e in family.edges for t in e.tensors}
    unknown = sorted(n for n in names - set(expected) - heads if not family.is_ignored(n))
    if unknown:
        raise UserError(
            f"{checkpoint.directory}: tensor {unknown[0]} is not part of a {family.name} model; check config.json"
        )


def _check_tensor(checkpoint: HFCheckpoint, matrix: Matrix, dtype: torch.dtype) -> None:
    shape = tuple(checkpoint.shape(matrix.name))
    if shape != matrix.shape:
        raise UserError(
            f"{checkpoint.directory}: tensor {matrix.name} is {list(shape)}, config.json says {list(matrix.shape)}"
        )
    stored = checkpoint.dtype(matrix.name)
    if stored not in DTYPE_NAMES:
        raise UserError(f"{checkpoint.directory}: tensor {matrix.name} is {stored}; supported are F32, BF16, F16")
    if dtype is not torch.float32 and DTYPE_NAMES[stored] is not dtype:
        raise UserError(
            f"{checkpoint.directory}: tensor {matrix.name} is {stored} and would be rounded to bf16, so that frozen "
            "weights could not stay bit-identical; set precision.dtype=fp32, or convert the model first "
            "(tools/convert_dtype.py)"
        )


def import_weights(layout: Layout, checkpoint: HFCheckpoint) -> None:
    """Fill this rank's parameters; rows that pad the vocabulary become zero."""
    with torch.no_grad():
        for local in layout:
            fill(local.param.data, local, checkpoint)


def share_weights(layout: Layout) -> None:
    """Give all data- and context-parallel ranks the weights that the first of them read; collective.

    Small parameters go together, BUCKET bytes at a time.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if group.size() == 1:
        return
    source = dist.get_global_rank(group, 0)
    bucket: list[torch.Tensor] = []
    for local in layout:
        part = local.param.data.view(-1).view(torch.uint8)
        if part.numel() >= BUCKET:
            dist.broadcast(part, source, group=group)
            continue
        if sum(p.numel() for p in bucket) + part.numel() > BUCKET:
            _broadcast(bucket, source, group)
            bucket = []
        bucket.append(part)
    if bucket:
        _broadcast(bucket, source, group)


def _broadcast(parts: list[torch.Tensor], source: int, group: dist.ProcessGroup) -> None:
    together = torch.cat(parts)
    dist.broadcast(together, source, group=group)
    for part, own in zip(parts, together.split([part.numel() for part in parts]), strict=True):
        part.copy_(own)


def fill(shard: torch.Tensor, local: LocalParam, checkpoint: HFCheckpoint) -> None:
    """Read a parameter's shard [R, C] or [n] from the files into `shard`."""
    if sum(p.rows for p in local.pieces) < shard.shape[0]:
        shard.zero_()
    for piece in local.pieces:
        put(shard, piece, checkpoint.get_slice(piece.matrix.name)[piece.index])
