"""Statistics of the tensors that multiply the weights, taken by forward hooks during a calibration pass."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ssu.errors import UserError
from megatron_ssu.models.layout import LocalParam
from megatron_ssu.scoring.file import INPUT_MEAN_SQUARE, INPUT_NORM
from megatron_ssu.session import Session


@dataclass
class TokenMask:
    """Which tokens of the running micro-batch are real; set before each forward step of a chunk."""

    mask: Tensor | None = None  # bool [b, s]; None: all are real


@dataclass
class InputSums:
    """Sums over this rank's tokens, float64 [I of the shard]."""

    squares: Tensor  # sum of X_tj^2
    means: Tensor  # sum over rows of the mean of X_tj^2 over the row's real tokens
    handles: list = field(default_factory=list)


class InputStatistics:
    """Collects, for every linear layer of the session's chunks, the squares of its input by column.

    The hooks see the tensor that multiplies the weight: norms are modules of their own in front of the linear layers. Under
    sequence parallelism a column-parallel layer shows this rank's part of the sequence.
    """

    def __init__(self, session: Session) -> None:
        self.session, self.tokens = session, TokenMask()
        self.sums: dict[str, InputSums] = {}
        self.locals: dict[str, LocalParam] = {}
        self.rows = 0
        self._handles = []
        modules = {id(p): m for c in session.chunks for m in c.modules() for p in m.parameters(recurse=False)}
        for local in session.layout:
            if local.pieces and local.pieces[0].matrix.scored:
                key = local.pieces[0].matrix.name
                self.locals[key] = local
                zeros = torch.zeros(local.param.shape[1], dtype=torch.float64, device=local.param.device)
                self.sums[key] = InputSums(zeros, zeros.clone())
                module = modules[id(local.param)]
                self._handles.append(module.register_forward_pre_hook(self._hook(key, local.split == 0)))

    def _hook(self, key: str, column_parallel: bool):
        sums = self.sums[key]
        scattered = column_parallel and self.session.config.sequence_parallel

        @torch.no_grad()
        def hook(module: torch.nn.Module, args: tuple) -> None:
            mask = self._mask(args[0].shape[0], scattered)
            # fp32 squares, added up in float64: [s, b, I] -> [b, I].
            squares = args[0].detach().float().square()
            if mask is not None:
                squares = squares * mask.t().unsqueeze(-1)
            per_row = squares.sum(0, dtype=torch.float64)
            sums.squares += per_row.sum(0)
            sums.means += (per_row / self._lengths(args[0].shape[0], scattered).unsqueeze(-1)).sum(0)

        return hook

    def _mask(self, length: int, scattered: bool) -> Tensor | None:
        if self.tokens.mask is None or not scattered:
            return self.tokens.mask
        first = parallel_state.get_tensor_model_parallel_rank() * length
        return self.tokens.mask[:, first : first + length]

    def _lengths(self, length: int, scattered: bool) -> Tensor:
        """Real tokens of each row, at least 1, float64 [b] (or [1] where all rows are whole)."""
        if self.tokens.mask is None:
            size = self.session.mesh.tensor if scattered else 1
            return torch.tensor([length * size], dtype=torch.float64)
        return self.tokens.mask.sum(1, dtype=torch.float64).clamp(min=1.0)

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def merge(self, rows: int) -> dict[str, dict[str, Tensor]]:
        """Statistics over all ranks: first matrix of each parameter -> {input_norm, input_mean_square}, float64 [I of shard].

        `rows` is the number of calibration rows over all ranks. Collective over tensor- and data-parallel ranks.

        Raises:
            UserError: NaN or infinite activations, naming the layer.
        """
        found = {}
        for key, sums in self.sums.items():
            both = torch.stack([sums.squares, sums.means])
            if self.locals[key].split == 0 and self.session.config.sequence_parallel:
                dist.all_reduce(both, group=parallel_state.get_tensor_model_parallel_group())
            dist.all_reduce(both, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
            found[key] = {INPUT_NORM: both[0].sqrt(), INPUT_MEAN_SQUARE: both[1] / max(1, rows)}
        return found

    @staticmethod
    def check(found: dict[str, dict[str, Tensor]]) -> None:
        for key, statistics in found.items():
            if not torch.isfinite(statistics[INPUT_NORM]).all():
                raise UserError(
                    f"calibration: the input of {key} holds NaN or infinite values; look for broken weights in front of it"
                )
