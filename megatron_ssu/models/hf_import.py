"""Read a Hugging Face directory straight into the shards of a mesh: of the ranks that hold a slice one reads it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from megatron_ssu.engine.mesh import replica_group
from megatron_ssu.engine.ranks import on_all_ranks
from megatron_ssu.engine.replicas import share
from megatron_ssu.errors import UserError
from megatron_ssu.io.dtypes import STORED_NAMES
from megatron_ssu.models.family import Dims, Family
from megatron_ssu.models.hf_files import HFCheckpoint, row_window
from megatron_ssu.models.layout import Layout, LocalParam, put
from megatron_ssu.models.matrix import Matrix

DTYPE_NAMES: dict[str, torch.dtype] = {stored: getattr(torch, name) for stored, name in STORED_NAMES.items()}

PORTION = 1 << 26  # bytes of a tensor that are read at a time


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
    """Fill this rank's parameters; rows that pad the vocabulary become zero. Collective.

    Of the replicas of a shard each reads a part of its parameters, all at the same time, and sends it to the others: every
    byte is read by one replica. Raises UserError, on all ranks alike, where a file cannot be read on any of them.
    """
    shared, mine = [], []
    for expert in (False, True):
        group, params = replica_group(expert=expert), [local for local in layout if local.expert == expert]
        readers = assign_readers([local.param.numel() for local in params], dist.get_world_size(group))
        own = dist.get_rank(group)
        mine += [local for local, reader in zip(params, readers, strict=True) if reader == own]
        shared.append(([local.param.data for local in params], readers, group))
    with torch.no_grad():
        on_all_ranks(lambda: _read(mine, checkpoint))
        for tensors, readers, group in shared:
            share(tensors, readers, group)


def _read(params: Iterable[LocalParam], checkpoint: HFCheckpoint) -> None:
    for local in params:
        fill(local.param.data, local, checkpoint)


def assign_readers(sizes: Sequence[int], replicas: int) -> list[int]:
    """Which replica reads each of a shard's parameters of `sizes` elements: neighbours, whose tensors share files, in runs
    of about the same size."""
    total, middles, start = max(1, sum(sizes)), [], 0
    for size in sizes:
        middles.append(2 * start + size)
        start += size
    return [min(replicas - 1, middle * replicas // (2 * total)) for middle in middles]


def fill(shard: torch.Tensor, local: LocalParam, checkpoint: HFCheckpoint) -> None:
    """Read a parameter's shard [R, C] or [n] from the files into `shard`; beside it at most PORTION bytes are held.

    Raises UserError where a file cannot be read.
    """
    if sum(p.rows for p in local.pieces) < shard.shape[0]:
        shard.zero_()
    for piece in local.pieces:
        name = piece.matrix.name
        whole, itemsize = checkpoint.get_slice(name), DTYPE_NAMES[checkpoint.dtype(name)].itemsize
        for part in piece.portions(PORTION // itemsize):
            put(shard, part, whole[part.index])
