"""Estimates against the bytes of the tensors that are really there."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_ssu.estimate.estimate import estimate
from megatron_ssu.shield.shield_file import load_shield
from tests.dist import estimate_work as work
from tests.dist.test_shielded_training import random_shield
from tests.dist.work import mesh
from tests.models import make_model

SIZES = {"hidden_size": 128, "intermediate_size": 320, "max_position_embeddings": 128}
LENGTH = 96
MESHES = {
    "TP1": (1, mesh()),
    "DP4": (4, mesh()),
    "TP2": (2, mesh(2)),
    "TP2+SP, DP2": (4, mesh(2, sequence=True)),
    "PP2": (2, mesh(1, 2)),
    "PP2xVPP2": (2, mesh(1, 2, 2)),
    "TP2xPP2xDP2": (8, mesh(2, 2)),
}
RECOMPUTE = {
    "none": {},
    "core_attn": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "core_attn+mlp": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    return {
        (kind, dtype): make_model(kind, folder / f"{kind}-{dtype}", dtypes[dtype], **SIZES)
        for kind in ("olmo2", "llama", "llama-tied", "qwen3", "gemma2", "qwen3-moe-mixed", "mixtral")
        for dtype in dtypes
    }


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize(
    "kind,dtype,shielded", [("olmo2", "bf16", True), ("llama-tied", "fp32", True), ("llama", "bf16", False)]
)
def test_state_is_what_the_ranks_hold(name, kind, dtype, shielded, ranks, models, tmp_path):
    check_state(*MESHES[name], kind, dtype, shielded, ranks, models, tmp_path)


def check_state(world, parallel, kind, dtype, shielded, ranks, models, tmp_path):
    model = models[kind, dtype]
    file = random_shield(model, tmp_path / "shield.safetensors") if shielded else None
    run = work.make_run(str(model), parallel, dtype, {}, LENGTH)
    found = ranks.run(work.state, world, run, str(file) if file else None)
    hf = json.loads((model / "config.json").read_text())
    run.method.name = "ssu" if shielded else "none"
    expected = estimate(run, hf, world, shield=load_shield(file) if file else None, engine=False)
    by_stage = world // len(expected.stages)
    for number, stage in enumerate(expected.stages):
        ranks_of_stage = found[number * by_stage : (number + 1) * by_stage]
        # Tensor-parallel ranks differ in their compact parameters, data-parallel ones in their parts of the state.
        mean = {key: sum(r[key] for r in ranks_of_stage) / by_stage for key in ranks_of_stage[0]}
        assert mean["parameters"] == pytest.approx(stage.parameters + stage.compact, rel=0.05)
        if not shielded:
            assert {r["parameters"] for r in ranks_of_stage} == {stage.parameters}
        for key in ("weights", "gradients", "optimizer", "gradient_copies"):
            assert mean[key] == pytest.approx(getattr(stage.state, key), rel=0.05), key


EXPERT_MESHES = {
    "TP1": (1, mesh()),
    "DP2, EP2": (2, {**mesh(), "expert_model_parallel_size": 2}),
    "TP2+SP, DP2, EP2": (4, {**mesh(2, sequence=True), "expert_model_parallel_size": 2}),
    "TP2+SP, PP2": (4, mesh(2, 2, sequence=True)),
}


@pytest.mark.parametrize("name", EXPERT_MESHES)
@pytest.mark.parametrize("kind,shielded", [("qwen3-moe-mixed", True), ("mixtral", False)])
def test_state_of_experts_is_what_the_ranks_hold(name, kind, shielded, ranks, models, tmp_path):
    check_state(*EXPERT_MESHES[name], kind, "bf16", shielded, ranks, models, tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_activations_of_experts_are_what_autograd_keeps(dtype, ranks, models):
    """Of all ranks together: their experts get more tokens or fewer than evenly."""
    for world, parallel in (EXPERT_MESHES[k] for k in ("TP1", "DP2, EP2")):
        for kind in ("qwen3-moe-mixed", "mixtral"):
            model = models[kind, dtype]
            hf = json.loads((model / "config.json").read_text())
            run = work.make_run(str(model), parallel, dtype, {}, LENGTH)
            found = ranks.run(work.activations, world, run)
            expected = estimate(run, hf, world, engine=False).stages[0].activations
            assert sum(found) / world == pytest.approx(expected, rel=0.08), (kind, parallel)


@pytest.mark.parametrize("kind,dtype", [("olmo2", "bf16"), ("llama", "fp32"), ("gemma2", "bf16")])
def test_activations_are_what_autograd_keeps(kind, dtype, ranks, models):
    model = models[kind, dtype]
    hf = json.loads((model / "config.json").read_text())
    for world, parallel in ((1, mesh()), (2, mesh(2)), (2, mesh(2, sequence=True))):
        for name, transformer in RECOMPUTE.items():
            run = work.make_run(str(model), parallel, dtype, transformer, LENGTH)
            found = ranks.run(work.activations, world, run)
            expected = estimate(run, hf, world, engine=False).stages[0].activations
            assert found[0] == pytest.approx(expected, rel=0.05), (parallel, name)
