"""Mixtral: Mistral's attention, and experts in all layers, under names of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_ssu.models.families.parts import (
    EDGES,
    PRE_NORM_EXPERTS,
    epsilon,
    plain_experts,
    pre_norm_layer,
    refuse_unless,
    router_settings,
)
from megatron_ssu.models.family import Entry, Family

_NAMES = {"mlp.": "block_sparse_moe.", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def _renamed(entry: Entry) -> Entry:
    tensors = entry.tensors
    for ours, theirs in _NAMES.items():
        tensors = tuple(tensor.replace(ours, theirs) for tensor in tensors)
    return replace(entry, tensors=tensors)


def _check(config: Any) -> None:
    plain_experts(config, normalised=True)
    refuse_unless(config, "router_jitter_noise", (0.0, None))


MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    layer=tuple(_renamed(e) if e.only == "sparse" else e for e in PRE_NORM_EXPERTS if e.only != "dense"),
    edges=EDGES,
    settings=lambda config: {**epsilon(config), **router_settings(config, normalised=True)},
    layer_spec=pre_norm_layer,
    check=_check,
)
