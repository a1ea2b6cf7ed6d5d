"""Statistics of the tensors that multiply the weights, taken by forward hooks during a calibration pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ssu.engine.experts import expert_layers
from megatron_ssu.engine.mesh import replica_group
from megatron_ssu.errors import UserError
from megatron_ssu.models.layout import LocalParam
from megatron_ssu.models.parallel_model import ParallelModel
from megatron_ssu.ops import kernels
from megatron_ssu.scoring.routed_tokens import RoutedTokens
from megatron_ssu.scoring.scores_file import INPUT_MEAN_SQUARE, INPUT_NORM

_BLOCK = 64  # tokens that are added up in float32 before they continue in float64


def sum_of_squares(x: Tensor) -> Tensor:
    """Sum over tokens of the squares of x [t, I]: float64 [I]. Reads x once and makes no copy as large as x."""
    if not x.is_cuda:
        if kernels.backend(x.device) != "torch" and x.is_contiguous():
            return kernels.column_sums(x, square=True)
        parts = [part.float().square().sum(0) for part in x.split(_BLOCK)]
        return torch.stack(parts).sum(0, dtype=torch.float64) if parts else x.new_zeros(x.shape[1], dtype=torch.float64)
    return _sum_by_norms(x)


def _sum_by_norms(x: Tensor) -> Tensor:
    """For CUDA: a norm is one kernel that widens as it reads, where a square would be written to memory first."""
    blocks = x.shape[0] // _BLOCK
    head, tail = x[: blocks * _BLOCK], x[blocks * _BLOCK :]
    norms = torch.linalg.vector_norm(head.reshape(blocks, _BLOCK, x.shape[1]), dim=1, dtype=torch.float32)
    total: Tensor = norms.double().square().sum(0) + tail.double().square().sum(0)
    return total


@dataclass
class InputSums:
    """Sums over this rank's tokens, float64 [I of the shard]."""

    squares: Tensor  # sum of X_tj^2
    means: Tensor  # sum over rows of the mean of X_tj^2 over the row's real tokens


@dataclass(frozen=True)
class _Watched:
    """A parameter whose module's input is looked at."""

    local: LocalParam
    chunk: int
    scattered: bool  # its input is this rank's part of the sequence
    by_head: bool  # a norm of q or k that all heads share; its input is this rank's heads
    copies: int  # tensor-parallel ranks that see the same heads
    expert: bool


def _watched(session: ParallelModel, local: LocalParam, chunk: int) -> _Watched:
    of_heads = local.name.endswith(
        ("q_layernorm.weight", "k_layernorm.weight")
    )  # a norm of projections of whole sequences
    partial = local.split == 0 if local.matrices[0].scored else not of_heads  # no expert's: it sees all of its tokens
    copies = session.mesh.tensor // session.source.dims.groups if local.name.endswith("k_layernorm.weight") else 1
    return _Watched(
        local,
        chunk,
        scattered=partial and session.config.sequence_parallel,
        by_head=of_heads and local.split is None,
        copies=max(1, copies),
        expert=local.expert,
    )


class InputStatistics:
    """Collects the squares, by column, of the input of every linear layer of the session's chunks; with `norms`, of the
    norms too.

    An expert's layers see the tokens that are routed to the expert: sums are over those, means over all of a row's tokens.
    The hooks see the tensor that multiplies the weight: norms are modules of their own before the linear layers. Under
    sequence parallelism a column-parallel layer and the norms show this rank's part of the sequence. `begin` is called
    before each forward step of a chunk; what runs again for recomputation is not counted again.
    """

    def __init__(self, session: ParallelModel, *, norms: bool = False) -> None:
        self.session = session
        self.mask: Tensor | None = None  # bool [b, s] of the running micro-batch; None: all tokens are real
        self.sums: dict[str, InputSums] = {}
        self.watched: dict[str, _Watched] = {}
        self._pending: set[str] = set()
        self._routed: list[RoutedTokens] = []
        self._handles = []
        experts = {module: found for chunk in session.chunks for module, found in self._experts(chunk)}
        owners = {id(p): (m, i) for i, c in enumerate(session.chunks) for m in c.modules() for p in m.parameters(False)}
        for local in session.layout:
            if not local.pieces or not local.primary:
                continue
            matrix = local.matrices[0]
            if matrix.scored or (norms and matrix.is_norm):
                module, chunk = owners[id(local.param)]
                self.watched[matrix.name] = _watched(session, local, chunk)
                zeros = torch.zeros(local.param.shape[-1], dtype=torch.float64, device=local.param.device)
                self.sums[matrix.name] = InputSums(zeros, zeros.clone())
                hook = self._expert_hook(matrix.name, *experts[module]) if local.expert else self._hook(matrix.name)
                self._handles.append(module.register_forward_pre_hook(hook))

    def _experts(self, chunk: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, tuple[RoutedTokens, int]]]:
        """The linear layers of experts, each with its layer's tokens and its expert's number on this rank."""
        for layer in expert_layers(chunk):
            routed = RoutedTokens(layer)
            self._routed.append(routed)
            self._handles.append(layer.register_forward_pre_hook(self._before_experts(routed)))
            for number, expert in enumerate(layer.experts.local_experts):
                yield from ((module, (routed, number)) for module in (expert.linear_fc1, expert.linear_fc2))

    def _before_experts(self, routed: RoutedTokens) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
        ranks = self.session.mesh.tensor if self.session.config.sequence_parallel else 1

        @torch.no_grad()
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            shape = args[0].shape  # [s of this rank, b, H]
            first = self.session.mesh.tensor_rank * shape[0] if ranks > 1 else 0
            routed.begin(self.mask, shape[0] * ranks, first, shape)

        return hook

    def _expert_hook(
        self, name: str, routed: RoutedTokens, expert: int
    ) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
        sums = self.sums[name]

        @torch.no_grad()
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            if name not in self._pending:
                return
            self._pending.discard(name)
            squares, means = routed.sums(expert, args[0].detach())
            sums.squares += squares
            sums.means += means

        return hook

    def begin(self, chunk: torch.nn.Module, mask: Tensor | None) -> None:
        """The next forward step is of `chunk`, over a micro-batch with this mask, bool [b, s]."""
        self.mask = mask
        number = next(i for i, c in enumerate(self.session.chunks) if c is chunk)
        self._pending |= {name for name, watched in self.watched.items() if watched.chunk == number}

    def _hook(self, name: str) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
        sums, scattered, by_head = self.sums[name], self.watched[name].scattered, self.watched[name].by_head
        width, ranks = len(sums.squares), self.session.mesh.tensor

        @torch.no_grad()
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            if name not in self._pending:
                return
            self._pending.discard(name)
            x = args[0].detach()
            x = x.reshape(*x.shape[:2], -1, width)  # [s, b, 1, I]; of a norm by head [s, b, heads, I]
            heads = x.shape[2] * ranks if by_head else 1
            if self.mask is None:
                total = sum_of_squares(x.flatten(0, 2))
                sums.squares += total
                sums.means += total / (x.shape[0] * heads * (ranks if scattered else 1))
                return
            first = self.session.mesh.tensor_rank * x.shape[0] if scattered else 0
            for row, real in enumerate(self.mask):
                total = sum_of_squares(x[:, row][real[first : first + x.shape[0]]].flatten(0, 1))
                sums.squares += total
                sums.means += total / (real.sum().clamp(min=1) * heads)

        return hook

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        for routed in self._routed:
            routed.close()

    def merge(self, rows: int) -> dict[str, dict[str, Tensor]]:
        """Statistics over all ranks: first matrix of each parameter -> {input_norm, input_mean_square}, float64 [I of shard].

        `rows` is the number of calibration rows over all ranks. Collective over a stage's ranks.
        """
        found = {}
        for name, sums in self.sums.items():
            both = torch.stack([sums.squares, sums.means])
            if self.watched[name].scattered or self.watched[name].by_head:
                dist.all_reduce(both, group=parallel_state.get_tensor_model_parallel_group())
                both[0] /= self.watched[name].copies
            dist.all_reduce(both, group=replica_group(expert=self.watched[name].expert))
            found[name] = {INPUT_NORM: both[0].sqrt(), INPUT_MEAN_SQUARE: both[1] / max(1, rows)}
        return found

    @staticmethod
    def check(found: dict[str, dict[str, Tensor]]) -> None:
        """Raises UserError, naming the layer, for NaN or infinite activations."""
        for name, statistics in found.items():
            if not torch.isfinite(statistics[INPUT_NORM]).all():
                raise UserError(
                    f"calibration: the input of {name} holds NaN or infinite values; "
                    "look at the weights of the layers before it, or score in fp32"
                )
