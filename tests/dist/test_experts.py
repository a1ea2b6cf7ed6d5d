"""Mixtures of experts against transformers, with experts on one rank or on several."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.dist import score_work
from tests.dist.test_families import check_bits, check_gradients, check_logits, check_shields, check_training, models  # noqa: F401
from tests.dist.work import mesh
from tests.models import EXPERTS, make_model


def experts(parallel, ranks):
    return {**parallel, "expert_model_parallel_size": ranks}


MESHES = {
    "TP1": (1, mesh()),
    "EP2": (2, experts(mesh(), 2)),
    "TP2+SP": (2, mesh(2, sequence=True)),
    "TP2+SP, EP2": (2, experts(mesh(2, sequence=True), 2)),
    "PP2": (2, mesh(1, 2)),
    "TP2+SP, DP2, EP4": (4, experts(mesh(2, sequence=True), 4)),
    "TP2+SP, DP2, EP2": (4, experts(mesh(2, sequence=True), 2)),
    "TP2+SP, PP2, EP2": (4, experts(mesh(2, 2, sequence=True), 2)),
}
FEW = ("TP1", "TP2+SP", "TP2+SP, DP2, EP2")
few_and_all = pytest.mark.parametrize(
    "meshes",
    [{k: MESHES[k] for k in FEW}, pytest.param(MESHES, marks=pytest.mark.slow)],
    ids=["few", "all"],
)
names = pytest.mark.parametrize(
    "name", [n if n == "qwen3-moe" else pytest.param(n, marks=pytest.mark.slow) for n in EXPERTS]
)
# Not of gradients; not target-contrast, which divides by numbers near 0 where an expert gets a single token.
SCORES = [name for name in score_work.NAMES if name not in ("fisher", "target-contrast")]


@pytest.mark.parametrize("name", EXPERTS)
@few_and_all
def test_logits_equal_transformers(name, meshes, models, ranks):  # noqa: F811
    check_logits(ranks, models(name), meshes)


@names
@few_and_all
def test_import_then_export_gives_every_bit_back(name, meshes, ranks, tmp_path):
    check_bits(ranks, name, tmp_path, meshes)


@names
def test_gradients_of_every_parameter_equal_transformers(name, models, ranks, tmp_path):  # noqa: F811
    """On meshes without replicas, of which each would have the reduced gradients of a part."""
    check_gradients(ranks, models(name), tmp_path, {k: MESHES[k] for k in ("TP1", "TP2+SP, EP2", "TP2+SP, PP2, EP2")})


@names
@few_and_all
def test_training_under_a_shield_equals_plain_torch(name, meshes, models, ranks, tmp_path):  # noqa: F811
    check_training(ranks, models(name), tmp_path, meshes)


@pytest.fixture
def idle_model(tmp_path):
    """A model whose router sends nothing to experts 0 and 7 of layer 1: their logits are 0, and of two opposite ones one is
    above that."""
    model = make_model("qwen3-moe", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    router = tensors["model.layers.1.mlp.gate.weight"]
    router[[0, 7]] = 0
    router[[2, 4, 6]] = -router[[1, 3, 5]]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


@few_and_all
def test_scores_and_shields_do_not_depend_on_the_mesh(meshes, idle_model, ranks, tmp_path):
    # An expert may get a single token: of numbers near 0 among its inputs rounding is a large part.
    scores = check_shields(ranks, idle_model, tmp_path, meshes, SCORES, of_largest=1e-6)
    idle = [f"model.layers.1.mlp.experts.{k}.{n}_proj.weight" for k in (0, 7) for n in ("down", "gate", "up")]
    assert scores.unreached() == sorted(idle)
    assert all(not scores.column("wanda", name).any() for name in idle)
    assert all(scores.column("magnitude", name).all() for name in idle)


def test_statistics_are_over_the_tokens_that_an_expert_gets(models, ranks):  # noqa: F811
    """Against transformers' own routing: the input of an expert's up projection is what its tokens bring, that of its down
    projection is multiplied by the router's weight."""
    import transformers

    model = models("qwen3-moe")
    scores = ranks.run(score_work.mesh_scores, 2, str(model), MESHES["TP2+SP, EP2"][1], ["wanda"])[0]
    net = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    block, seen = net.model.layers[2].mlp, []
    block.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    data = score_work.tokens()
    with torch.no_grad():
        net(data.tokens)
        x = seen[0].double()  # [b, s, H]
        weights = (x.float() @ block.gate.weight.T).softmax(-1)
        best = weights.topk(2)
        chosen = torch.zeros_like(weights).scatter(-1, best.indices, best.values / best.values.sum(-1, keepdim=True))
        for expert in range(8):
            gate, up = block.experts.gate_up_proj[expert].double().chunk(2)
            inner = torch.nn.functional.silu(x @ gate.T) * (x @ up.T) * chosen[..., expert, None]
            for kind, values in (("up", x), ("down", inner)):
                values = values.square() * ((chosen[..., expert] > 0) & data.mask)[..., None]
                means = sum(v.sum(0) / real.sum() for v, real in zip(values, data.mask, strict=True)) / len(values)
                name = f"model.layers.2.mlp.experts.{expert}.{kind}_proj.weight"
                norms = values.sum((0, 1)).sqrt()
                np.testing.assert_allclose(scores.tensors[f"input_norm/column/{name}"], norms, rtol=1e-4)
                np.testing.assert_allclose(scores.tensors[f"input_mean_square/column/{name}"], means, rtol=1e-4)


def test_layers_without_experts_are_as_wide_as_config_says(models):  # noqa: F811
    shapes = {k: v.shape for k, v in load_file(models("qwen3-moe-mixed") / "model.safetensors").items()}
    assert "model.layers.3.mlp.up_proj.weight" in shapes and "model.layers.1.mlp.gate.weight" in shapes
    config = json.loads((models("qwen3-moe-mixed") / "config.json").read_text())
    assert shapes["model.layers.0.mlp.up_proj.weight"][0] == config["intermediate_size"]
