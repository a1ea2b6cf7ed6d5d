"""What ranks do for test_families.py: models that are built wrong in one place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_ssu.engine.experts import expert_layers
from megatron_ssu.models.parallel_model import ParallelModel, open_model
from tests.dist import work

DAMAGES = {
    "window one wider": lambda model: _softmax(model, "window", lambda window: window and window + 1),
    "window one narrower": lambda model: _softmax(model, "window", lambda window: window and window - 1),
    "no attention cap": lambda model: _softmax(model, "cap", lambda cap: None),
    "no logit cap": lambda model: model.chunks[0].output_layer._forward_hooks.clear(),
    "no embedding scale": lambda model: model.chunks[0].embedding.word_embeddings._forward_hooks.clear(),
    "attention scale of the head": lambda model: _scale(model),
    "rope of the first kind in all layers": lambda model: _rope(model, lambda rope: 0),
    "positions where there are none and none where there are": lambda model: _rope(
        model, lambda rope: 0 if rope is None else None
    ),
    "no biases": lambda model: _fill(model, "bias", 0.0),
    "no q and k norms": lambda model: _fill(model, "layernorm.weight", 1.0),
    "norms that are not centred": lambda model: _uncentre(model),
    "all channels turned alike": lambda model: _turned(model),
    "router weights that add up otherwise": lambda model: _route(
        model, "moe_router_pre_softmax", not model.config.moe_router_pre_softmax
    ),
    "one expert per token more": lambda model: _route(model, "moe_router_topk", model.config.moe_router_topk + 1),
    "experts in another order": lambda model: _swap_experts(model),
}


def damaged_logits(model: str, damages: list[str], ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits [b, s, V] on one rank of the model as it is, and with each of these damages alone."""
    found = []
    for damage in (None, *damages):
        session = open_model(work.run_config(model, work.mesh()))
        if damage is not None:
            DAMAGES[damage](session)
        logits = work.logits_of(session, ids)
        assert logits is not None
        found.append(logits)
    return found


def _attention(model: ParallelModel) -> Iterator[Any]:
    for layer in model.chunks[0].decoder.layers:
        yield layer.self_attention


def _softmax(model: ParallelModel, name: str, new: Any) -> None:
    for attention in _attention(model):
        softmax = attention.core_attention.scale_mask_softmax
        if hasattr(softmax, name):
            setattr(softmax, name, new(getattr(softmax, name)))


def _scale(model: ParallelModel) -> None:
    for attention in _attention(model):
        attention.core_attention.softmax_scale = attention.hidden_size_per_attention_head**-0.5


def _rope(model: ParallelModel, new: Any) -> None:
    for attention in _attention(model):
        attention.rope = new(attention.rope)


def _turned(model: ParallelModel) -> None:
    for attention in _attention(model):
        attention.turned = None


def _fill(model: ParallelModel, ending: str, value: float) -> None:
    for attention in _attention(model):
        for name, param in attention.named_parameters():
            if name.endswith(ending):
                param.data.fill_(value)


def _route(model: ParallelModel, name: str, value: Any) -> None:
    setattr(model.config, name, value)
    for layer in expert_layers(model.chunks[0]):
        layer.router.topk = model.config.moe_router_topk


def _swap_experts(model: ParallelModel) -> None:
    for layer in expert_layers(model.chunks[0]):
        first, second, *_ = layer.experts.local_experts
        for one, other in zip(first.parameters(), second.parameters(), strict=True):
            one.data, other.data = other.data, one.data


def _uncentre(model: ParallelModel) -> None:
    for module in model.chunks[0].modules():
        if hasattr(module, "centred"):
            module.centred = False
