"""Mean squared gradients, summed by column and by row, taken during the backward pass over calibration data.

Squares do not add up over samples, so each row is a micro-batch of its own. No weight takes a gradient: when backward
reaches a linear layer, a hook forms dW = dy^T x from the layer's input and its output's gradient, a block of rows at a
time, adds the squares up and drops the block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_ssu.errors import UserError
from megatron_ssu.models.layout import LocalParam, take
from megatron_ssu.models.parallel_model import ParallelModel
from megatron_ssu.scoring.base import GradientPass
from megatron_ssu.scoring.gather import Entry, add_tensor_ranks, spread_columns, spread_rows

_BLOCK = 1 << 21  # elements of dW that are there at a time, and never more than a quarter of the matrix


class SquaredGradients(GradientPass):
    """Adds up squared gradients of all linear weights of the session's chunks while it is open.

    Each backward step must be of one sample. Weights take no gradient between `__init__` and `close`.
    """

    def __init__(self, session: ParallelModel, score: str) -> None:
        """`score`: the name that the sums are entered under."""
        self.session, self.score = session, score
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}  # matrix -> float64 [I], [O] of the shard
        self._handles = []
        self._trainable = [p for c in session.chunks for p in c.parameters() if p.requires_grad]
        for param in self._trainable:
            param.requires_grad_(False)
        for chunk in session.chunks:
            if getattr(chunk, "embedding", None) is not None:
                # Without weights that take gradients, the graph starts at the embedding's output.
                start = chunk.embedding.register_forward_hook(lambda module, args, out: out.requires_grad_())
                self._handles.append(start)
        owners = {id(p): m for c in session.chunks for m in c.modules() for p in m.parameters(False)}
        for local in session.layout:
            if local.matrices[0].scored:
                self._watch(local, owners[id(local.param)])

    def _watch(self, local: LocalParam, module: torch.nn.Module) -> None:
        for piece in local.parts:
            columns = torch.zeros(local.param.shape[1], dtype=torch.float64, device=local.param.device)
            self.sums[piece.matrix.name] = (columns, columns.new_zeros(piece.rows))
        inputs: list[Tensor] = []  # of the forward call that runs; a cell that two hooks share

        def before(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
            inputs[:] = [args[0].detach()]

        def after(output: Tensor) -> None:
            x = inputs.pop()
            if torch.is_grad_enabled():  # off in the first pass of a layer that is recomputed
                output.register_hook(self._backward(local, x))

        self._handles.append(module.register_forward_pre_hook(before))
        norm = getattr(module, "post_norm", None)
        if norm is None:
            self._handles.append(module.register_forward_hook(lambda _, args, output: after(output[0])))
        else:  # the module's output comes after a norm, the weight's before it
            self._handles.append(norm.register_forward_pre_hook(lambda _, args: after(args[0])))

    def _backward(self, local: LocalParam, x: Tensor) -> Callable[[Tensor], None]:
        """A hook for the gradient of the weight's output [s, b, O]; x [s, b, I] is the weight's input."""

        @torch.no_grad()
        def hook(dy: Tensor) -> None:
            source = x
            if self.session.config.sequence_parallel:  # one of the two is this rank's part of the sequence
                group = parallel_state.get_tensor_model_parallel_group()
                if local.split == 0:
                    source = gather_from_sequence_parallel_region(source, group=group)
                else:
                    dy = gather_from_sequence_parallel_region(dy, group=group)
            source, outputs = source.flatten(0, 1).float(), dy.flatten(0, 1).t()
            for piece in local.pieces:
                self._add(*self.sums[piece.matrix.name], take(outputs, piece), source)

        return hook

    @staticmethod
    def _add(columns: Tensor, rows: Tensor, dy: Tensor, x: Tensor) -> None:
        """Add the squares of dy [O, t] @ x [t, I] to columns [I] and rows [O]."""
        step = max(1, min(_BLOCK // x.shape[1], -(-dy.shape[0] // 4)))
        for first in range(0, dy.shape[0], step):
            # float64 before squaring: squares of small gradients leave float32's range.
            squares = (dy[first : first + step].float() @ x).double().square_()
            rows[first : first + step] += squares.sum(1)
            columns += squares.sum(0)
            del squares  # before the next block is made

    def close(self) -> None:
        """Take the hooks off and let the weights take gradients again."""
        for handle in self._handles:
            handle.remove()
        for param in self._trainable:
            param.requires_grad_(True)

    def entries(self, samples: int) -> list[Entry]:
        """The scores, over all ranks' samples; `samples` counts them. Collective over tensor- and data-parallel ranks."""
        found: list[Entry] = []
        for local in self.session.layout:
            for piece in local.parts if local.matrices[0].scored else ():
                for sums in self.sums[piece.matrix.name]:
                    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
                columns, rows = (sums / samples for sums in self.sums[piece.matrix.name])
                add_tensor_ranks(self.session, local, columns, rows)
                found += spread_columns(self.session, local, piece, {self.score: columns})
                found += spread_rows(self.session, local, piece, {self.score: rows})
        return found

    def check(self) -> None:
        """Raises UserError, naming the layer, for NaN or infinite gradients."""
        for name, sums in self.sums.items():
            if not all(torch.isfinite(s).all() for s in sums):
                raise UserError(
                    f"calibration: the gradient of {name} is NaN or infinite; "
                    "look at the weights of the layers around it, or score in fp32"
                )
