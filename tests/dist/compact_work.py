"""What the ranks of the compact parameters' tests do; a linear layer with Transformer Engine's seam for weight gradients."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_ssu.compact import linear
from megatron_ssu.compact.parameters import CompactParameters
from megatron_ssu.models.parallel_model import open_model
from megatron_ssu.shield.shield_file import load_shield
from megatron_ssu.train import trainer as trainer_module
from megatron_ssu.train.trainer import Trainer
from tests.dist import work


class _Seam(torch.autograd.Function):
    """Y = X W^T whose backward pass hands X and dY, whole on this rank, to the layer's store, as Transformer Engine's does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, module: Any, options: dict[str, Any]) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.module, ctx.options, ctx.weight, ctx.wanted = module, options, weight, weight.requires_grad
        total = _gathered(x, options["tp_group"]) if options["sequence_parallel"] else x
        return total.matmul(weight.t())

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        group, whole = ctx.options["tp_group"], grad_output.matmul(weight)
        if ctx.options["sequence_parallel"]:
            x = _gathered(x, group)
            grad_input = whole.new_empty((whole.shape[0] // group.size(), *whole.shape[1:]))
            dist.reduce_scatter_tensor(grad_input, whole, group=group)
        else:
            grad_input = whole
            if ctx.options["allreduce_dgrad"]:
                dist.all_reduce(grad_input, group=group)
        assert ctx.wanted and ctx.module.fuse_wgrad_accumulation and ctx.module.wgrad_store.delay_wgrad_compute()
        target = ctx.weight.main_grad
        assert target.shape == weight.shape and target.dtype == torch.float32

        def gemm(x: Tensor, grad_output: Tensor) -> None:
            target.add_(grad_output.t().matmul(x.flatten(0, -2)))

        ctx.module.wgrad_store.put([x, grad_output.flatten(0, -2).contiguous()], gemm)
        assert not hasattr(ctx.weight, "grad_added_to_main_grad"), "a placeholder would be returned for the weight"
        return grad_input, None, None, None


def _gathered(x: Tensor, group: Any) -> Tensor:
    whole = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


def stand_in_gemm(gradients: list[Tensor], x: Tensor, grad_output: Tensor, inputs: Any, outputs: list[Any]) -> None:
    """What Transformer Engine's GEMM does, in torch."""
    for gradient, columns, output in zip(gradients, inputs.columns(x.flatten(0, -2)), outputs, strict=True):
        gradient.addmm_(output.columns(grad_output).float().t(), columns.float())


def _give(module: Any, store: Any) -> None:
    module.wgrad_store, module.fuse_wgrad_accumulation = store, True

    def forward(input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        return _Seam.apply(input, weight, module, options)

    module._forward_impl = forward


def _in_a_layer(module: Any) -> bool:
    """The layers' linear layers, not the head."""
    return (
        isinstance(module, ColumnParallelLinear | RowParallelLinear) and module.weight.shape[0] != work.padded_vocab()
    )


def as_engine_layers(stack: ExitStack, gemm: Any) -> None:
    """Within `stack` the layers' linear layers count as Transformer Engine's, with `gemm` for compact gradients."""
    stack.enter_context(
        mock.patch.object(linear, "is_local_linear", lambda module: not _in_a_layer(module) and _local(module))
    )
    stack.enter_context(mock.patch.object(linear, "is_engine_linear", _in_a_layer))
    stack.enter_context(mock.patch.object(linear, "give_weight_gradients_to", _give))
    stack.enter_context(mock.patch.object(trainer_module, "tried_gemm", lambda config: gemm))


def _local(module: Any) -> bool:
    return isinstance(module, ColumnParallelLinear | RowParallelLinear)


def train_engine(model: str, parallel: dict[str, Any], steps: int, dense: bool, **options: Any) -> dict[str, Any]:
    """`work.train_steps` with stand-ins for Transformer Engine's layers; `dense`: which compute whole gradients."""
    with ExitStack() as stack:
        as_engine_layers(stack, None if dense else stand_in_gemm)
        return work.train_steps(model, parallel, steps, **options)


def shapes(model: str, parallel: dict[str, Any], shield_file: str) -> dict[str, Any]:
    """Of this rank: compact parameters' shapes by name, what else trains, the state dict's keys, pinned weights."""
    session = open_model(work.run_config(model, parallel))
    compact = CompactParameters(session.chunks, session.layout, load_shield(shield_file), gemm=None)
    named = [(name, p) for chunk in session.chunks for name, p in chunk.named_parameters()]
    return {
        "compact": {name: tuple(p.shape) for name, p in named if "compact_" in name},
        "trains": [name for name, p in named if p.requires_grad and "compact_" not in name],
        "state": [key for chunk in session.chunks for key in chunk.state_dict()],
        "pinned": len(compact.pinned),
    }


def padding_after(
    model: str, parallel: dict[str, Any], steps: int, shield_file: str, dtype: str, **options: Any
) -> tuple[int, float]:
    """Elements of padding in this rank's compact parameters, and their largest value or gradient after training."""
    found: list[Trainer] = []
    init = Trainer.__init__

    def noted(self: Any, *args: Any) -> None:
        init(self, *args)
        found.append(self)

    with mock.patch.object(Trainer, "__init__", noted):
        work.train_steps(model, parallel, steps, shield_file=shield_file, dtype=dtype, **options)
    count, largest = 0, 0.0
    for weight in found[0].compact.compact.values():
        for matrix in weight.matrices:
            rows, columns = matrix.part.real
            for tensor in (matrix.param.detach().float(), matrix.param.main_grad):  # type: ignore[attr-defined]
                rest = tensor.clone()
                rest[:rows, :columns] = 0
                largest = max(largest, float(rest.abs().max()))
            count += matrix.param.numel() - rows * columns
    return count, largest
