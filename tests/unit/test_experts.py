"""Mixtures of experts without weights: what is refused and how, their table, FLOPs, and how reports show them."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from megatron_ssu.commands.start import check_settings
from megatron_ssu.errors import UserError
from megatron_ssu.estimate.flops import flops_per_token
from megatron_ssu.methods.hft import HalfFineTuning
from megatron_ssu.methods.registry import method_of, read_run
from megatron_ssu.methods.s2ft import SparseFineTuning, SparseOptions
from megatron_ssu.models.families import family_of
from megatron_ssu.models.family import Dims
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.matrix import of_experts
from megatron_ssu.scoring.scores_file import Scores
from megatron_ssu.shield.inspect import inspect_shield
from megatron_ssu.shield.plan import PlanOptions, plan_shield
from megatron_ssu.shield.plots import draw_all
from megatron_ssu.shield.verify import verify
from tests.models import EXPERTS, make_model
from tests.unit.test_families import config_of

EP, TP = "parallel.expert_model_parallel_size", "parallel.tensor_model_parallel_size"
SP = "parallel.sequence_parallel=true"

GOOD = [(1, []), (2, [f"{EP}=2"]), (4, [f"{EP}=4", f"{TP}=2", SP]), (8, [f"{EP}=8"]), (1, ["shield.score=magnitude"])]
BAD = [
    (3, [f"{EP}=2"], [EP, "2 must divide the 3 ranks"]),
    (3, [f"{EP}=3"], [EP, "must divide the 8 experts", "got 3"]),
    (1, [f"{EP}=0"], [EP, "at least 1"]),
    (2, [f"{TP}=2"], ["parallel.sequence_parallel", "must be true", "2 tensor-parallel ranks"]),
    (1, ["model.moe_token_dispatcher_type=alltoall"], ["allgather without CUDA, got alltoall"]),
    (1, ["model.moe_token_dispatcher_type=flex"], ["model.moe_token_dispatcher_type", "got flex"]),
    (1, ["model.moe_grouped_gemm=true"], ["model.moe_grouped_gemm", "one by one"]),
    (1, ["model.moe_aux_loss_coeff=0.1"], ["model.moe_aux_loss_coeff", "not supported"]),
    (1, ["method.name=gmt"], ["method.name: gmt", "experts"]),
    (1, ["method.name=lota"], ["method.name: lota", "experts"]),
    (1, ["method.name=lora"], ["method.name: lora", "experts"]),
    (1, ["shield.score=fisher"], ["shield.score: fisher", "experts", "wanda"]),
    (1, ["shield.also_score=[fisher]"], ["fisher", "experts"]),
]


def settings(folder, overrides):
    (folder / "data.jsonl").touch()
    (folder / "run.yaml").write_text(
        f"model: {{path: {folder}}}\ncheckpoint: {{directory: {folder / 'run'}}}\n"
        f"data: {{train: {folder / 'data.jsonl'}, sequence_length: 64}}\n"
        f"train: {{global_batch_size: 24}}\nshield: {{calibration: {{path: {folder / 'data.jsonl'}}}}}\n"
    )
    run = read_run(str(folder / "run.yaml"), overrides)
    return run, method_of(run), config_of("qwen3-moe")


@pytest.mark.parametrize("world,overrides", GOOD)
def test_these_runs_are_taken(world, overrides, tmp_path):
    check_settings(*settings(tmp_path, overrides), world)


@pytest.mark.parametrize("world,overrides,words", BAD, ids=[" ".join(row[1]) for row in BAD])
def test_bad_runs_are_refused_in_one_line(world, overrides, words, tmp_path):
    with pytest.raises(UserError) as caught:
        check_settings(*settings(tmp_path, overrides), world)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_experts_of_a_dense_model_are_refused(tmp_path):
    for override, word in ((f"{EP}=2", "without experts"), ("model.moe_token_dispatcher_type=allgather", "no experts")):
        run, method, _ = settings(tmp_path, [override])
        with pytest.raises(UserError, match=word):
            check_settings(run, method, config_of("llama"), 2)


@pytest.mark.parametrize("kind", EXPERTS)
def test_a_token_s_flops_are_those_of_its_experts(kind, tmp_path):
    tensors = load_file(make_model(kind, tmp_path / "model") / "model.safetensors")
    hf = json.loads((tmp_path / "model" / "config.json").read_text())
    dims = Dims.from_hf(hf)
    assert dims.experts is not None
    weights = 0
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and name != "model.embed_tokens.weight":
            weights += tensor.numel() * (dims.experts.active / dims.experts.count if ".experts." in name else 1)
    attention = 12 * dims.layers * dims.heads * dims.head * 64
    assert flops_per_token(family_of(hf), dims, 64) == pytest.approx(6 * weights + attention)


@pytest.fixture
def mixed():
    hf = config_of("qwen3-moe-mixed")
    return list(family_of(hf).matrices(Dims.from_hf(hf))), Dims.from_hf(hf)


def test_half_fine_tuning_freezes_as_large_a_part_of_every_layer(mixed):
    matrices, dims = mixed
    masks = HalfFineTuning().draw(matrices, dims)
    for layer in range(dims.layers):
        mlp = [m for m in matrices if m.layer == layer and m.kind in ("gate_proj", "up_proj", "down_proj")]
        assert len(mlp) == (12 if layer in (1, 5, 7) else 3)
        assert abs(sum(m.name in masks for m in mlp) - len(mlp) / 2) <= 1


def test_sparse_fine_tuning_draws_channels_of_down_projections_of_any_width(mixed):
    matrices, dims = mixed
    masks = SparseFineTuning(SparseOptions(down=0.25)).draw(matrices, dims)
    down = [m for m in matrices if m.kind == "down_proj"]
    assert {m.shape[1] for m in down} == {40, 96}
    trainable = sum(masks[m.name].units - masks[m.name].frozen_units for m in down)
    assert trainable == sum(m.shape[1] for m in down) // 4
    assert all(masks[m.name].frozen_units == masks[m.name].units for m in matrices if m.kind == "router")


def test_reports_show_the_experts_of_a_layer_in_one_line(tmp_path):
    model = make_model("qwen3-moe", tmp_path / "model")
    hf = json.loads((model / "config.json").read_text())
    matrices = {m.name: m for m in family_of(hf).matrices(Dims.from_hf(hf))}
    draw_scores = np.random.default_rng(0)
    tensors = {f"wanda/column/{n}": draw_scores.random(m.shape[1]) for n, m in matrices.items() if m.scored}
    scores = Scores("model", model_fingerprint(model), matrices, tensors, ["wanda"])
    shield = plan_shield(scores, PlanOptions(), method="ssu")
    inspection = inspect_shield(shield, scores)
    assert len(inspection.views) == 4 * (4 + 8 * 3) and len(inspection.lines()) == 4 * 7
    assert len(inspection.to_dict()["matrices"]) == len(inspection.views)
    console = Console(file=io.StringIO(), width=150)
    inspection.render(console)
    text = console.file.getvalue()
    assert text.count("down_proj (8 experts)") == 4 and "160" in text
    assert all(path.is_file() for path in draw_all(inspection, tmp_path / "pictures"))

    adapted = tmp_path / "adapted"
    make_model("qwen3-moe", adapted)
    moved = load_file(adapted / "model.safetensors")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    column = int(np.flatnonzero(shield.masks[name].bits())[0])
    moved[name][0, column] += 1
    save_file(moved, adapted / "model.safetensors", {"format": "pt"})
    report = verify(model, adapted, shield)
    assert report.status == 1
    console = Console(file=io.StringIO(), width=150)
    report.render(console)
    text = console.file.getvalue()
    assert text.count(of_experts(name)) == 1 and f"moved though frozen: {name}: 1 columns ({column})" in text
