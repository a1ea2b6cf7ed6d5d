"""Weights, layers, stages and ranks of which nothing trains are no parameters, or padding; training is that of an oracle."""

from __future__ import annotations

import numpy as np
import pytest

from tests.dist import frozen_work
from tests.dist.test_shielded_training import oracle
from tests.dist.work import mesh
from tests.models import make_model

STEPS = 4
SOME = r"layers\.1\.|layers\.0\.mlp|layers\.3\.mlp\.down_proj"
FIRST_STAGE, LAST_STAGE = r"embed_tokens|layers\.[01]\.", r"layers\.[23]\.|lm_head|model\.norm"
EVERYTHING = r"."
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: make_model(kind, folder / kind) for kind in ("olmo2", "llama-tied")}


def equals_the_oracle(results, model, shield):
    found = np.array(results[0]["history"])
    assert all(result["history"] == results[0]["history"] for result in results)
    expected = np.array(oracle(model, shield, found[:, 2]))
    assert np.abs(found[:, 0] - expected[:, 0]).max() < 1e-5
    assert np.allclose(found[:, 1], expected[:, 1], rtol=1e-4)
    assert expected[0, 0] != expected[-1, 0], "something trains"


@pytest.mark.parametrize("transformer", [{}, RECOMPUTE], ids=["", "recompute"])
@pytest.mark.parametrize(
    "kind,pattern,world,parallel",
    [
        ("olmo2", SOME, 1, mesh()),
        ("olmo2", FIRST_STAGE, 2, mesh(1, 2)),
        ("olmo2", FIRST_STAGE, 2, mesh(1, 2, 2)),
        ("olmo2", LAST_STAGE, 2, mesh(1, 2)),
        ("llama-tied", "embed_tokens", 1, mesh()),
        ("llama-tied", "embed_tokens", 4, mesh(2, 2)),
    ],
    ids=["layers", "first-stage", "first-chunks", "last-stage", "tied-embedding", "tied-embedding-TP2xPP2"],
)
def test_training_equals_the_oracle(kind, pattern, world, parallel, transformer, ranks, models, tmp_path):
    model, shield = models[kind], tmp_path / "shield.safetensors"
    frozen_work.frozen_shield(str(model), pattern).save(shield)
    results = ranks.run(frozen_work.train, world, str(model), parallel, str(shield), STEPS, transformer=transformer)
    equals_the_oracle(results, model, shield)
    if pattern in (FIRST_STAGE, LAST_STAGE) and not parallel.get("virtual_pipeline_model_parallel_size"):
        nothing = results[0 if pattern == FIRST_STAGE else 1]
        assert nothing["owned"] == nothing["state_bytes"] == nothing["gradients"] == 0


@pytest.mark.parametrize("transformer", [{}, RECOMPUTE], ids=["", "recompute"])
@pytest.mark.parametrize("kind", ["olmo2", "llama-tied"])
def test_a_tensor_parallel_rank_with_nothing_to_train(kind, transformer, ranks, models, tmp_path):
    model, shield = models[kind], tmp_path / "shield.safetensors"
    frozen_work.one_rank_shield(str(model)).save(shield)
    results = ranks.run(frozen_work.train, 4, str(model), mesh(2, 2), str(shield), STEPS, transformer=transformer)
    equals_the_oracle(results, model, shield)
    assert [result["trainable"] > 0 for result in results] == [True, False, True, False]
    for has, lacks in (results[:2], results[2:]):  # padding stands for what trains on the other rank
        assert lacks["gradients"] == has["gradients"] > 0 and lacks["compact"] == has["compact"]


@pytest.mark.parametrize("transformer", [{}, RECOMPUTE], ids=["", "recompute"])
@pytest.mark.parametrize("world,parallel", [(1, mesh()), (2, mesh(1, 2))], ids=["TP1", "PP2"])
def test_nothing_trains(world, parallel, transformer, ranks, models, tmp_path):
    model, shield = models["olmo2"], tmp_path / "shield.safetensors"
    frozen_work.frozen_shield(str(model), EVERYTHING).save(shield)
    results = ranks.run(frozen_work.train, world, str(model), parallel, str(shield), STEPS, transformer=transformer)
    expected = np.array(oracle(model, shield, [0.0] * STEPS))
    for result in results:
        found = np.array(result["history"])
        assert (found[:, 1] == 0).all() and np.abs(found[:, 0] - expected[:, 0]).max() < 1e-5
        assert result["owned"] == result["state_bytes"] == result["gradients"] == 0


def test_what_is_frozen_is_in_no_buffer(ranks, models, tmp_path):
    model, shield = models["olmo2"], tmp_path / "shield.safetensors"
    frozen_work.frozen_shield(str(model), SOME).save(shield)
    found = ranks.run(frozen_work.after_a_step, 1, str(model), str(shield))[0]
    assert found["asking"] == found["buffered"]
    assert min(found["mains"]) > 0 and len(found["mains"]) > 10
    assert found["left"] == 0, "gradients are freed after the step"
    trains = {name for name in found["asking"] if "linear_" in name and "norm" not in name}
    # Whatever trains of a linear weight is a compact parameter; of the frozen layer, MLP and projection there is none.
    assert all(".compact_" in name for name in trains)
    compact = {tuple(name.split(".")[2:5:2]) for name in trains}
    assert compact == {
        *(("0", name) for name in ("linear_qkv", "linear_proj")),
        *((layer, name) for layer in "23" for name in ("linear_qkv", "linear_proj", "linear_fc1")),
        ("2", "linear_fc2"),
    }
