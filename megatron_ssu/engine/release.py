"""Memory of a wrapped model and its optimizer, given back while another model is about to be built.

A DDP chunk holds the nodes that accumulate gradients, and their hooks hold the chunk and its parameters: references that go
through C++, where Python's garbage collector does not see them. Without `release` a chunk that trained lasts as long as
the process.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ssu.engine.optimizer import members, parts


def release(config: TransformerConfig, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Free weights, gradients, main weights and moments, and what refers to the chunks. None of them can be used after it."""
    if config.fp8:
        from megatron.core.extensions.transformer_engine import FP8GlobalStateManager

        FP8GlobalStateManager.reset()  # it keeps the scales of layers that are gone
    config.grad_scale_func = config.finalize_model_grads_func = config.no_sync_func = None
    unset_num_microbatches_calculator()
    for chunk in chunks:
        chunk.grad_accs.clear()
        if chunk.use_forward_hook:
            chunk.disable_forward_pre_hook(param_sync=False)
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            free((buffer.grad_data, buffer.param_data))
        free(chunk.parameters())
    for part in [inner for member in members(optimizer) for inner in (member.optimizer, *parts(member))]:
        for group in part.param_groups:
            free(group["params"])
        for state in part.state.values():
            free(state.values())


def free(values: Iterable[Any]) -> None:
    """Give back the memory of the plain tensors among `values`, whoever else holds them."""
    for value in values:
        if type(value) in (Tensor, torch.nn.Parameter) and value.untyped_storage().resizable():
            value.untyped_storage().resize_(0)
