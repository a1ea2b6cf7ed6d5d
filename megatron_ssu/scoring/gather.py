"""What a rank contributes to a scores file: values that no other rank sends."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ssu.models.layout import LocalParam, Piece
from megatron_ssu.models.parallel_model import ParallelModel

Entry = tuple[str, int, int, np.ndarray]  # key, first index, whole length, values


def spread_columns(
    session: ParallelModel, local: LocalParam, piece: Piece, columns: Mapping[str, Tensor]
) -> list[Entry]:
    """score -> values by column, whole sums, [I] or this rank's part of them where tensor parallelism splits columns."""
    shape = piece.matrix.shape
    mine = _answers(session, local, alone=_split(local, piece))
    first = piece.col_start if len(shape) == 2 else piece.row_start
    return [(f"{k}/column/{piece.matrix.name}", first, shape[-1], v.cpu().numpy()) for k, v in columns.items() if mine]


def spread_rows(session: ParallelModel, local: LocalParam, piece: Piece, rows: Mapping[str, Tensor]) -> list[Entry]:
    """score -> values by row of a matrix, whole sums, [O] or this rank's part of them."""
    matrix = piece.matrix
    mine = _answers(session, local, alone=local.split == 0)
    return [
        (f"{k}/row/{matrix.name}", piece.row_start, matrix.shape[0], v.cpu().numpy()) for k, v in rows.items() if mine
    ]


def spread_matrix(session: ParallelModel, local: LocalParam, piece: Piece, values: Mapping[str, Tensor]) -> list[Entry]:
    """score -> value [1] of a matrix, a whole sum."""
    mine = _answers(session, local, alone=False)
    return [(f"{k}/matrix/{piece.matrix.name}", 0, 1, v.cpu().numpy()) for k, v in values.items() if mine]


def add_tensor_ranks(session: ParallelModel, local: LocalParam, columns: Tensor, rows: Tensor) -> None:
    """Add up, in place, the sums over rows or over columns that tensor parallelism has cut. Collective."""
    if session.mesh.tensor > 1 and local.split is not None:
        dist.all_reduce(columns if local.split == 0 else rows, group=parallel_state.get_tensor_model_parallel_group())


def add_all_tensor_ranks(session: ParallelModel, local: LocalParam, values: Tensor) -> None:
    """Add up, in place, sums over whole matrices that tensor parallelism has cut. Collective."""
    if session.mesh.tensor > 1 and local.split is not None:
        dist.all_reduce(values, group=parallel_state.get_tensor_model_parallel_group())


def _answers(session: ParallelModel, local: LocalParam, *, alone: bool) -> bool:
    """Whether this rank sends what it has of a matrix; `alone`: no other tensor-parallel rank has the same."""
    first = session.mesh.first_replica(expert=local.expert)
    return first and (alone or local.expert or session.mesh.tensor_rank == 0)


def _split(local: LocalParam, piece: Piece) -> bool:
    """Whether this rank holds some of the features alone: columns of a matrix, elements of a norm."""
    return local.split == (1 if len(piece.matrix.shape) == 2 else 0)
