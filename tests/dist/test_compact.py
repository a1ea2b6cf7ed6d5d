"""Compact parameters: what they are made of, and the same trajectories on every mesh, schedule and kind of layer."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from megatron_ssu.models.families import family_of
from megatron_ssu.models.family import Dims
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.shield.mask import Mask
from megatron_ssu.shield.shield_file import Shield
from tests.dist import compact_work, work
from tests.dist.test_shielded_training import OVERLAP, oracle, random_shield
from tests.dist.work import mesh
from tests.models import make_model

STEPS = 20
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LOCAL = {
    "TP2+SP, overlap": (4, mesh(2, sequence=True), {"ddp": OVERLAP}),
    "PP2xVPP2": (2, mesh(1, 2, 2), {}),
    "PP2xVPP2, gathered with the step": (
        4,
        mesh(1, 2, 2),
        {"ddp": OVERLAP, "optimizer": {"overlap_param_gather_with_optimizer_step": True}},
    ),
    "TP2+SP, full recompute": (2, mesh(2, sequence=True), {"transformer": FULL}),
    "TP2, selective recompute": (
        2,
        mesh(2),
        {"transformer": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}},
    ),
}
ENGINE = {
    "TP1": (1, mesh(), {}),
    "TP2+SP": (2, mesh(2, sequence=True), {}),
    "TP2xPP2xDP2, overlap, full recompute": (8, mesh(2, 2), {"ddp": OVERLAP, "transformer": FULL}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("olmo2", tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def shields(model):
    return {
        kind: random_shield(model, model.parent / f"{kind}.safetensors", kind) for kind in ("column", "row", "element")
    }


@pytest.fixture(scope="module")
def expected(ranks, model, shields):
    """Plain torch's trajectories by granularity: [loss, norm] by step."""
    lrs = ranks.run(work.train_steps, 1, str(model), mesh(), STEPS, shield_file=str(shields["column"]))[0]["history"]
    return {kind: np.array(oracle(model, file, [lr for *_, lr in lrs])) for kind, file in shields.items()}


def same(history, wanted):
    found = np.array(history)[:, :2]
    assert np.abs(found[:, 0] - wanted[:, 0]).max() < 1e-5
    assert np.allclose(found[:, 1], wanted[:, 1], rtol=1e-4)


@pytest.mark.parametrize("case", LOCAL)
def test_local_layers_follow_plain_torch(case, ranks, model, shields, expected):
    world, parallel, options = LOCAL[case]
    for kind, file in shields.items():
        found = ranks.run(work.train_steps, world, str(model), parallel, STEPS, shield_file=str(file), **options)
        same(found[0]["history"], expected[kind])


@pytest.mark.parametrize("dense", [False, True], ids=["compact", "dense"])
@pytest.mark.parametrize("case", ENGINE)
def test_layers_with_a_store_follow_plain_torch(case, dense, ranks, model, shields, expected):
    world, parallel, options = ENGINE[case]
    for kind, file in shields.items():
        arguments = (str(model), parallel, STEPS, dense)
        found = ranks.run(compact_work.train_engine, world, *arguments, shield_file=str(file), **options)
        same(found[0]["history"], expected[kind])


def part_shield(model, path, choose):
    """A shield of the matrices for which `choose(matrix)` gives a mask."""
    hf = json.loads((model / "config.json").read_text())
    matrices = {m.name: m for m in family_of(hf).matrices(Dims.from_hf(hf))}
    masks = {name: mask for name, m in matrices.items() if (mask := choose(m)) is not None}
    shielded = {name: matrices[name] for name in masks}
    Shield("ssu", model.name, model_fingerprint(model), matrices=shielded, masks=masks).save(path)
    return str(path)


def test_each_weight_becomes_what_its_share_asks_for(ranks, model, tmp_path):
    def choose(matrix):
        frozen = np.zeros(matrix.shape[-1], dtype=bool)
        if "q_proj" in matrix.name:  # k and v, in the same weight, are not shielded
            frozen[: matrix.shape[1] // 2 + 3] = True
        elif "layers.0.mlp.down_proj" in matrix.name:
            frozen[:] = True
        elif "layers.1.mlp.down_proj" in matrix.name:
            frozen[:4] = True
        elif matrix.kind == "embedding":
            return Mask.of("row", matrix.shape, np.arange(matrix.shape[0]) < 5)
        elif matrix.name == "model.norm.weight":
            return Mask.of("element", matrix.shape, np.arange(matrix.shape[0]) % 2 == 0)
        else:
            return None
        return Mask.of("column", matrix.shape, frozen)

    shield = part_shield(model, tmp_path / "shield.safetensors", choose)
    hidden = json.loads((model / "config.json").read_text())["hidden_size"]
    (found,) = ranks.run(compact_work.shapes, 1, str(model), mesh(), shield)
    first = "decoder.layers.0.self_attention.linear_qkv.compact_"
    kept = hidden - hidden // 2 - 3
    assert found["compact"][first + "q_proj"] == (hidden, -(-kept // 16) * 16)
    assert found["compact"][first + "k_proj"][1] == found["compact"][first + "v_proj"][1] == hidden
    assert {name.rpartition("_proj")[0][-1] for name in found["compact"]} == {"q", "k", "v"}
    assert "decoder.layers.0.mlp.linear_fc2.weight" not in found["trains"], "frozen as a whole"
    assert "decoder.layers.1.mlp.linear_fc2.weight" in found["trains"], "pinned: 4 columns of many"
    assert {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight"} <= set(found["trains"])
    assert found["pinned"] == 3
    assert not any("compact_" in key for key in found["state"])
    assert "decoder.layers.0.self_attention.linear_qkv.weight" in found["state"]


@pytest.mark.parametrize("granularity,dtype", [("column", "bf16"), ("row", "fp32"), ("element", "fp32")])
def test_padding_stays_zero(granularity, dtype, ranks, tmp_path):
    model = make_model("olmo2", tmp_path / "model", {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    shield = str(random_shield(model, tmp_path / "shield.safetensors", granularity))
    for count, largest in ranks.run(compact_work.padding_after, 2, str(model), mesh(2), 5, shield, dtype):
        assert count > 0 and largest == 0


def test_gradient_buffers_hold_what_trains(ranks, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 640, "vocab_size": 128}
    model = make_model("olmo2", tmp_path / "model", torch.bfloat16, **sizes)

    def choose(matrix):
        draw = np.random.default_rng(len(matrix.name)).permutation(matrix.shape[-1])
        return Mask.of("column", matrix.shape, draw < matrix.shape[1] // 2) if matrix.scored else None

    shield = part_shield(model, tmp_path / "shield.safetensors", choose)
    shielded, stock = (
        ranks.run(work.train_steps, 1, str(model), mesh(), 1, dtype="bf16", shield_file=file)[0]
        for file in (shield, None)
    )
    whole = sum(np.prod(m.shape) for m in _scored(model))
    assert stock["gradients"] - shielded["gradients"] == pytest.approx(whole / 2, rel=0.01)


def _scored(model):
    hf = json.loads((model / "config.json").read_text())
    return [m for m in family_of(hf).matrices(Dims.from_hf(hf)) if m.scored]
