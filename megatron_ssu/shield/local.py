"""A rank's share of a shield: from matrices to the rows and columns of its parameter shards."""

from __future__ import annotations

import numpy as np
import torch

from megatron_ssu.models.layout import Layout, LocalParam, Piece
from megatron_ssu.shield.file import Mask, Shield
from megatron_ssu.shield.shards import RowRun, ShardMask


class LocalShield:
    """Answers, for this rank's parameters, which elements a shield freezes. True means frozen.

    Built before DDP wraps the model, kept for the run; it holds bytes per column and row, or a bit per element.
    """

    def __init__(self, shield: Shield, layout: Layout) -> None:
        self._locals: dict[torch.nn.Parameter, LocalParam] = {}
        self._masks: dict[str, Mask] = {}
        for local in layout:
            names = [p.matrix.name for p in local.pieces if p.matrix.name in shield.masks]
            for name in names:
                mask = shield.masks[name]
                if mask.frozen_units:
                    self._masks[name] = mask
            if any(name in self._masks for name in names):
                self._locals[local.param] = local

    def __contains__(self, param: torch.nn.Parameter) -> bool:
        return param in self._locals

    def mask(self, param: torch.nn.Parameter, start: int, stop: int) -> ShardMask | None:
        """The trainable elements of the flat range [start, stop) of this rank's `param`; None where nothing is frozen."""
        local = self._locals.get(param)
        if local is None:
            return None
        mask = self._shard_mask(local, start, stop)
        return None if mask.frozen == 0 else mask.to(param.device)

    def trainable_columns(self, param: torch.nn.Parameter) -> list[tuple[Piece, torch.Tensor | None]] | None:
        """For a parameter shielded by column alone: its pieces, each with its trainable columns [n] int64, counted within
        the shard, or None for all. None for a parameter that is not shielded, or shielded otherwise."""
        local = self._locals.get(param)
        if local is None:
            return None
        found: list[tuple[Piece, torch.Tensor | None]] = []
        for piece in local.pieces:
            mask = self._masks.get(piece.matrix.name)
            if mask is not None and mask.granularity != "column":
                return None
            found.append((piece, None if mask is None else _trainable(mask.bits(piece.col_start, piece.col_stop))))
        return found

    def _shard_mask(self, local: LocalParam, start: int, stop: int) -> ShardMask:
        masks = [self._masks.get(p.matrix.name) for p in local.pieces]
        shape = tuple(local.param.shape)
        if any(m is not None and m.granularity == "element" for m in masks):
            return ShardMask.from_bits((shape[0], shape[1] if len(shape) == 2 else 1), self._bits(local), start, stop)
        patterns: list[torch.Tensor | None] = [None]
        runs: list[RowRun] = []
        for piece, mask in zip(local.pieces, masks, strict=True):
            if mask is None:
                runs += [RowRun(r.shard_row, r.shard_row + r.count, 0) for r in piece.runs]
            elif mask.granularity == "column":
                patterns.append(_trainable(mask.bits(piece.col_start, piece.col_stop)))
                runs += [RowRun(r.shard_row, r.shard_row + r.count, len(patterns) - 1) for r in piece.runs]
            else:
                patterns.append(torch.empty(0, dtype=torch.int64))
                runs += _row_runs(piece, mask.rows(), len(patterns) - 1)
        runs.sort(key=lambda run: run.start)
        covered = runs[-1].stop if runs else 0
        if covered < shape[0]:
            runs.append(RowRun(covered, shape[0], 0))  # rows that pad the vocabulary
        return ShardMask.from_patterns(shape, runs, patterns, start, stop)

    def _bits(self, local: LocalParam) -> torch.Tensor:
        """Frozen elements of the whole shard, bool, for shields by element."""
        shape = local.param.shape
        bits = torch.zeros((shape[0], shape[1] if len(shape) == 2 else 1), dtype=torch.bool)
        for piece in local.pieces:
            mask = self._masks.get(piece.matrix.name)
            if mask is None:
                continue
            full = mask.full()
            part = full[piece.row_start : piece.row_stop]
            part = part[:, piece.col_start : piece.col_stop] if full.ndim == 2 else part[:, None]
            rows = torch.from_numpy(np.ascontiguousarray(part))
            for run in piece.runs:
                first = run.matrix_row - piece.row_start
                bits[run.shard_row : run.shard_row + run.count] = rows[first : first + run.count]
        return bits


def _trainable(frozen: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(~frozen))


def _row_runs(piece: Piece, frozen: np.ndarray, pattern: int) -> list[RowRun]:
    """Runs of rows of like state: frozen ones have the empty `pattern`, the others pattern 0."""
    runs = []
    for run in piece.runs:
        state = frozen[run.matrix_row : run.matrix_row + run.count]
        cuts = np.flatnonzero(np.diff(state)) + 1
        for first, stop in zip([0, *cuts.tolist()], [*cuts.tolist(), run.count], strict=True):
            runs.append(RowRun(run.shard_row + first, run.shard_row + stop, pattern if state[first] else 0))
    return runs
