"""Methods whose shield is drawn: what they freeze."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from megatron_ssu.methods.hft import HalfFineTuning, HalfOptions
from megatron_ssu.methods.s2ft import SparseFineTuning, SparseOptions
from megatron_ssu.models.families import family_of
from megatron_ssu.models.family import Dims
from megatron_ssu.models.matrix import ATTENTION_KINDS, MLP_KINDS

HF = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80, "vocab_size": 100,
    "max_position_embeddings": 64,
}  # fmt: skip


def model(kind="llama", layers=4):
    hf = {**HF, "model_type": kind, "num_hidden_layers": layers}
    dims = Dims.from_hf(hf)
    return list(family_of(hf).matrices(dims)), dims


@pytest.mark.parametrize("kind", ["llama", "olmo2"])
@pytest.mark.parametrize("layers", [1, 4, 5, 32])
def test_hft_freezes_half_of_each_layer(kind, layers):
    matrices, dims = model(kind, layers)
    masks = HalfFineTuning(HalfOptions()).draw(matrices, dims)
    assert all(mask.frozen_units == mask.units for mask in masks.values())
    by_name = {matrix.name: matrix for matrix in matrices}
    frozen = Counter((by_name[name].layer, by_name[name].kind) for name in masks)
    mlp = []
    for layer in range(layers):
        assert sum(frozen[layer, kind] for kind in ATTENTION_KINDS) == 2
        mlp.append(sum(frozen[layer, kind] for kind in MLP_KINDS))
        assert frozen[layer, "norm"] == (2 if kind == "olmo2" else 1)
    assert sum(mlp) == 2 * (layers // 2) + math.ceil(layers / 2) and set(mlp) <= {1, 2}
    assert not [name for name in masks if by_name[name].layer is None]


def test_hft_is_drawn_by_its_seed():
    matrices, dims = model()
    draws = [sorted(HalfFineTuning(HalfOptions(seed=seed)).draw(matrices, dims)) for seed in (42, 42, 43)]
    assert draws[0] == draws[1] != draws[2]


def test_s2ft_trains_a_few_channels_of_the_down_projections():
    matrices, dims = model(layers=8)
    masks = SparseFineTuning(SparseOptions(down=0.05)).draw(matrices, dims)
    open_columns = {m.name: mask.units - mask.frozen_units for m in matrices if (mask := masks.get(m.name)) is not None}
    assert sum(open_columns.values()) == int(0.05 * 8 * dims.ffn)
    assert all("down_proj" in name for name, count in open_columns.items() if count)
    assert (
        len({count for name, count in open_columns.items() if "down_proj" in name}) > 1
    )  # drawn over all layers together
    assert {m.kind for m in matrices if m.name not in masks} == {"embedding", "head"}
    original = SparseFineTuning(SparseOptions(down=0.05, embeddings=False)).draw(matrices, dims)
    assert {m.name for m in matrices} == set(original)


def test_s2ft_trains_whole_heads_of_the_output_projections():
    matrices, dims = model(layers=8)
    masks = SparseFineTuning(SparseOptions(down=0.0, output=0.25)).draw(matrices, dims)
    heads = 0
    for matrix in matrices:
        if matrix.kind == "o_proj":
            by_head = masks[matrix.name].columns().reshape(dims.heads, dims.head)
            assert all(row.all() or not row.any() for row in by_head)
            heads += int((~by_head[:, 0]).sum())
    assert heads == int(0.25 * 8 * dims.heads)
