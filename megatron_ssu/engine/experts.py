"""What megatron-core's mixture-of-experts layers need beyond their settings."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher

from megatron_ssu.engine.mesh import Mesh


def ready_router() -> None:
    """Let the router run without Transformer Engine: megatron-core 0.16.1 then looks up a name that it has not set."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]


def expert_layers(chunk: torch.nn.Module) -> Iterator[MoELayer]:
    """The layers with experts among a chunk's modules."""
    return (module for module in chunk.modules() if isinstance(module, MoELayer))


def mark_experts(chunk: torch.nn.Module, mesh: Mesh) -> None:
    """Let DDP reduce the experts' gradients over the ranks that hold the same experts, before it wraps the chunk.

    megatron marks them by `allreduce`, for which it looks at the expert-parallel size alone; but without expert parallelism
    too the tensor-parallel ranks, of which each has a part of the tokens, have replicas of the experts.
    """
    own_group = mesh.expert_data != mesh.data * mesh.context
    for layer in expert_layers(chunk):
        for param in layer.experts.parameters():
            param.allreduce = not own_group  # type: ignore[attr-defined]


def gathering_dispatcher(layer: MoELayer) -> MoEAllGatherTokenDispatcher:
    """A dispatcher for the layer that gathers the tokens of all tensor- and expert-parallel ranks and remembers, as `local_map`
    [tokens, local experts], which of them go to which expert, in the order that the experts get them."""
    return MoEAllGatherTokenDispatcher(
        layer.num_local_experts,
        layer.local_expert_indices,
        config=layer.config,
        pg_collection=moe_utils.get_default_pg_collection(),
    )
