"""Weight gradients of trainable columns only.

Of the three matrix products of a linear layer Y = X W^T, forward and input gradient need all of W; the weight gradient
dW = dY^T X is needed for trainable columns alone: dW[:, t] = dY^T X[:, t]. Here the layer keeps its own forward and
communication pattern, and the weight-gradient product of each logical matrix (q, k, v; gate, up) runs on the gathered
trainable input columns and is added into these columns of `weight.main_grad`.

megatron's local linear layers do their product in `_forward_impl`, before the row-parallel reduction and behind the
column-parallel input; `attach` puts the function of this module there, from outside the model. Transformer Engine's layers
run as they are, with a weight that asks for no gradient, and an identity behind their output computes it in the backward
pass. FP8 layers keep their own: an FP8 product of all columns takes no longer than one of half of them in bf16. Frozen
columns of `main_grad` then are not written, and nobody reads them.

Precision: in a bf16 model each micro-batch's product is accumulated in fp32, rounded to bf16 and then added to the fp32
`main_grad`, as megatron's own layers do without `gradient_accumulation_fusion`; that setting is refused with a shield.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.extensions import transformer_engine as engine
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_ssu.models.layout import Piece
from megatron_ssu.shield.local import LocalShield


@dataclass(frozen=True)
class MatrixColumns:
    """One logical matrix in the rows of a fused weight [O, I], and its trainable columns.

    The rows come in `groups` equal blocks of `block` rows; the matrix has rows [first, first + rows) of each.
    """

    groups: int
    block: int
    first: int
    rows: int
    columns: Tensor  # int64 [K], on the weight's device

    @classmethod
    def of(cls, piece: Piece, columns: Tensor, shard_rows: int) -> MatrixColumns:
        """Raises ValueError where the piece's runs are not evenly spread."""
        runs = piece.runs
        block = runs[1].shard_row - runs[0].shard_row if len(runs) > 1 else shard_rows
        first, rows = runs[0].shard_row, runs[0].count
        even = [(first + i * block, rows) for i in range(len(runs))]
        if even != [(run.shard_row, run.count) for run in runs]:
            raise ValueError(f"{piece.matrix.name}: rows are not spread evenly over its shard")
        return cls(len(runs), block, first, rows, columns)

    def of_rows(self, tensor: Tensor, dim: int) -> Tensor:
        """View of the matrix's rows along `dim` of `tensor`, as [..., groups, rows, ...]."""
        split = tensor.unflatten(dim, (self.groups, self.block))
        return split.narrow(dim + 1, self.first, self.rows)

    def add_gradient(self, main_grad: Tensor, grad_output: Tensor, inputs: Tensor) -> None:
        """main_grad[rows, columns] += grad_output[:, rows]^T inputs[:, columns]; grad_output [T, O], inputs [T, I]."""
        outputs = self.of_rows(grad_output, 1).reshape(grad_output.shape[0], -1)
        gradient = outputs.t().matmul(inputs.index_select(1, self.columns))
        target = self.of_rows(main_grad, 0)
        target.index_add_(2, self.columns, gradient.view(self.groups, self.rows, -1).to(main_grad.dtype))


class _CompactLinear(torch.autograd.Function):
    """Y = X W^T with megatron's tensor-parallel communication; the weight gradient goes to `main_grad` directly."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        matrices: tuple[MatrixColumns, ...],
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        group: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.matrices, ctx.group = weight, matrices, group
        ctx.allreduce_dgrad, ctx.sequence_parallel = allreduce_dgrad, sequence_parallel
        total = _gathered(x, group)[0] if sequence_parallel else x
        return total.matmul(weight.t())

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        gathering = None
        if ctx.sequence_parallel:
            x, gathering = _gathered(x, ctx.group, wait=False)
        grad_input = grad_output.matmul(weight)
        reducing = None
        if ctx.allreduce_dgrad:
            reducing = dist.all_reduce(grad_input, group=ctx.group, async_op=True)
        elif ctx.sequence_parallel:
            whole = grad_input
            grad_input = whole.new_empty((whole.shape[0] // ctx.group.size(), *whole.shape[1:]))
            reducing = dist.reduce_scatter_tensor(grad_input, whole, group=ctx.group, async_op=True)
        if gathering is not None:
            gathering.wait()
        _add_gradients(ctx.weight, ctx.matrices, grad_output.flatten(0, -2), x.flatten(0, -2))
        if reducing is not None:
            reducing.wait()
        return grad_input, _dummy(ctx.weight), None, None, None, None


class _WeightGradient(torch.autograd.Function):
    """Identity on a layer's output Y = X W^T; the weight gradient goes to `main_grad` in the backward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, y: Tensor, x: Tensor, weight: Tensor, matrices: tuple[MatrixColumns, ...], split: str, group: Any
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.matrices, ctx.split, ctx.group = weight, matrices, split, group
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        whole = grad_output
        if ctx.split == "input":
            x = _gathered(x, ctx.group)[0]
        elif ctx.split == "output":
            whole = _gathered(grad_output, ctx.group)[0]
        _add_gradients(ctx.weight, ctx.matrices, whole.flatten(0, -2), x.flatten(0, -2))
        return grad_output, None, _dummy(ctx.weight), None, None, None


def hold_weight_gradient(module: Any, matrices: tuple[MatrixColumns, ...], *, column: bool) -> None:
    """Let a linear layer of any kind compute no gradient of its `weight`, and an identity behind it do so.

    Under sequence parallelism the input of a `column`-parallel layer and the output of a row-parallel one are split along the
    sequence: they are gathered for the product.
    """
    name = "linear_output" if hasattr(module, "linear_output") else "forward"  # without the norm that may follow
    linear: Callable = getattr(module, name)
    weight = module.weight
    split = ("input" if column else "output") if module.sequence_parallel else "none"

    def held(x: Tensor) -> tuple[Tensor, Tensor | None]:
        weight.requires_grad_(False)
        try:
            y, bias = linear(x)
        finally:
            weight.requires_grad_(True)
        group = parallel_state.get_tensor_model_parallel_group()
        return _WeightGradient.apply(y, x, weight, matrices, split, group), bias

    setattr(module, name, held)
    module.holds_weight_gradient = True


def accumulate_in_gemm(chunks: Iterable[torch.nn.Module]) -> int:
    """Let Transformer Engine's linear layers with dense gradients add them to `main_grad` in fp32, within the GEMM.

    megatron's setting for this, `gradient_accumulation_fusion`, also asks Apex of the local output layer; this does not. DDP
    must wrap the `chunks` before the first backward pass. Returns the number of layers.
    """
    count = 0
    for chunk in chunks:
        for module in chunk.modules():
            if engine.HAVE_TE and isinstance(module, engine.TELinear) and not hasattr(module, "holds_weight_gradient"):
                module.fuse_wgrad_accumulation = True
                count += 1
    return count


def _gathered(x: Tensor, group: Any, *, wait: bool = True) -> tuple[Tensor, Any]:
    """All ranks' parts of the sequence: [s / TP, b, I] -> [s, b, I], and the handle of the exchange."""
    whole = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    handle = dist.all_gather_into_tensor(whole, x.contiguous(), group=group, async_op=not wait)
    return whole, handle


def _add_gradients(weight: Any, matrices: Iterable[MatrixColumns], grad_output: Tensor, inputs: Tensor) -> None:
    grad_output = grad_output.contiguous()
    for matrix in matrices:
        matrix.add_gradient(weight.main_grad, grad_output, inputs)
    weight.grad_added_to_main_grad = True


def _dummy(weight: Tensor) -> Tensor:
    """What stands for the gradient, so that DDP's hooks fire; its memory, one buffer per shape, is neither written nor read."""
    return _unread(weight.shape, weight.dtype, weight.device).detach()


@functools.cache
def _unread(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def attach(chunks: Iterable[torch.nn.Module], shield: LocalShield) -> int:
    """Let the linear layers whose weights are shielded by column alone compute compact weight gradients.

    `chunks` are GPTModels; DDP must wrap them before the first backward pass (it makes `main_grad`). Returns the number of
    layers. Layers of other kinds, and FP8 ones, keep their dense gradient, which the optimizer gathers from.
    """
    count = 0
    for chunk in chunks:
        for module in chunk.modules():
            local = isinstance(module, (ColumnParallelLinear, RowParallelLinear))
            held = engine.HAVE_TE and isinstance(module, engine.TELinear) and not module.config.fp8
            weight: Any = module.weight if local or held else None
            matrices = _matrices(weight, shield) if weight is not None else ()
            if matrices and local:
                module._forward_impl = _forward_of(matrices)  # type: ignore[method-assign]
            elif matrices:
                hold_weight_gradient(module, matrices, column=module.parallel_mode == "column")
            count += bool(matrices)
    return count


def _matrices(weight: torch.nn.Parameter, shield: LocalShield) -> tuple[MatrixColumns, ...]:
    """The logical matrices of a weight whose pieces are all shielded by column; else none."""
    pieces = shield.trainable_columns(weight)
    if pieces is None or sum(piece.rows for piece, _ in pieces) != weight.shape[0]:
        return ()
    everything = torch.arange(weight.shape[1])
    return tuple(
        MatrixColumns.of(piece, (everything if columns is None else columns).to(weight.device), weight.shape[0])
        for piece, columns in pieces
    )


def _forward_of(matrices: tuple[MatrixColumns, ...]) -> Any:
    def forward(
        input: Tensor,
        weight: Tensor,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        bias: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        if bias is not None:
            raise RuntimeError("layers with a bias are not supported")
        return _CompactLinear.apply(input, weight, matrices, allreduce_dgrad, sequence_parallel, tp_group)

    return forward
