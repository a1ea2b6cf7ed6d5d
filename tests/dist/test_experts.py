"""Mixtures of experts against transformers, with experts on one rank or on several."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import megatron_ssu as ssu
from megatron_ssu.shield.verify import verify
from tests.dist import library_work, methods_work, regularize_work, resume_work, score_work, work
from tests.dist.test_families import (  # noqa: F401
    check_bits,
    check_damages,
    check_gradients,
    check_logits,
    check_shields,
    check_training,
    models,
)
from tests.dist.test_shielded_training import random_shield
from tests.dist.work import mesh
from tests.models import EXPERTS, make_model
from tests.unit.data_makers import make_instruct_tokenizer


def experts(parallel, ranks):
    return {**parallel, "expert_model_parallel_size": ranks}


MESHES = {
    "TP1": (1, mesh()),
    "EP2": (2, experts(mesh(), 2)),
    "TP2+SP": (2, mesh(2, sequence=True)),
    "TP2+SP, EP2": (2, experts(mesh(2, sequence=True), 2)),
    "TP4+SP, EP2": (4, experts(mesh(4, sequence=True), 2)),
    "PP2": (2, mesh(1, 2)),
    "PP2xVPP2, DP2, EP2": (4, experts(mesh(1, 2, 2), 2)),
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
one_on_all = pytest.mark.parametrize(
    "name,meshes",
    [
        *(
            pytest.param(n, {k: MESHES[k] for k in FEW}, id=n, marks=() if n == "qwen3-moe" else pytest.mark.slow)
            for n in EXPERTS
        ),
        pytest.param("qwen3-moe-mixed", MESHES, id="qwen3-moe-mixed-all", marks=pytest.mark.slow),
    ],
)
# Not of gradients; not target-contrast, which divides by numbers near 0 where an expert gets a single token.
SCORES = [name for name in score_work.NAMES if name not in ("fisher", "target-contrast")]


@names
@few_and_all
def test_logits_equal_transformers(name, meshes, models, ranks):  # noqa: F811
    check_logits(ranks, models(name), meshes)


@names
def test_each_feature_counts(name, models, ranks):  # noqa: F811
    damages = ["router weights that add up otherwise", "one expert per token more", "experts in another order"]
    check_damages(ranks, models(name), damages)


@one_on_all
def test_import_then_export_gives_every_bit_back(name, meshes, ranks, tmp_path):
    check_bits(ranks, name, tmp_path, meshes)


@names
def test_gradients_of_every_parameter_equal_transformers(name, models, ranks, tmp_path):  # noqa: F811
    """On meshes without replicas, of which each would have the reduced gradients of a part."""
    check_gradients(ranks, models(name), tmp_path, {k: MESHES[k] for k in ("TP1", "TP2+SP, EP2", "TP2+SP, PP2, EP2")})


@one_on_all
def test_training_under_a_shield_equals_plain_torch(name, meshes, models, ranks, tmp_path):  # noqa: F811
    check_training(ranks, models(name), tmp_path, meshes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "transformer",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    ],
    ids=["full", "moe"],
)
def test_recomputed_layers_train_alike(transformer, models, ranks, tmp_path):  # noqa: F811
    model = models("qwen3-moe")
    shield, found = random_shield(model, tmp_path / "shield.safetensors"), []
    for given in ({}, transformer):
        world, parallel = MESHES["TP2+SP, EP2"]
        options = {"shield_file": str(shield), "transformer": given}
        found.append(ranks.run(work.train_steps, world, str(model), parallel, 3, **options)[0]["history"])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_idle_experts_train_alike(idle_model, ranks, tmp_path):
    check_training(ranks, idle_model, tmp_path, {k: MESHES[k] for k in ("TP1", "EP2")}, steps=2)


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


SAVED_ON = (4, MESHES["TP2+SP, DP2, EP2"][1])
LOADED_ON = {k: MESHES[k] for k in ("TP1", "TP2+SP", "TP2+SP, EP2", "TP2+SP, DP2, EP4", "PP2")}


@pytest.fixture(scope="module")
def saved(ranks, models, tmp_path_factory):  # noqa: F811
    """A shielded run with checkpoints, its shield, and its losses, norms and learning rates."""
    folder = tmp_path_factory.mktemp("saved")
    model = models("qwen3-moe-mixed")
    shield = random_shield(model, folder / "shield.safetensors")
    run = resume_work.make_run(str(model), SAVED_ON[1], str(folder / "run"), iterations=7)
    history = ranks.run(resume_work.train_run, SAVED_ON[0], run, str(shield))[0]["history"]
    (folder / "run" / "checkpoints" / "latest").write_text("4\n")
    return model, shield, folder / "run", history


@pytest.mark.parametrize("name", [k if k == "TP1" else pytest.param(k, marks=pytest.mark.slow) for k in LOADED_ON])
def test_a_run_resumes_on_another_mesh(name, saved, ranks, tmp_path):
    model, shield, directory, quiet = saved
    shutil.copytree(directory, tmp_path / "run")
    world, parallel = LOADED_ON[name]
    run = resume_work.make_run(str(model), parallel, str(tmp_path / "run"), iterations=7)
    resumed = ranks.run(resume_work.train_run, world, run, str(shield))[0]["history"]
    was, now = (np.array([history[i] for i in (5, 6, 7)]) for history in (quiet, resumed))
    np.testing.assert_allclose(now[:, 0], was[:, 0], rtol=1e-6)
    np.testing.assert_allclose(now[:, 1], was[:, 1], rtol=1e-5)
    assert (was[:, 2] == now[:, 2]).all()


def test_the_same_mesh_goes_on_bit_by_bit(saved, ranks, tmp_path):
    model, shield, directory, quiet = saved
    shutil.copytree(directory, tmp_path / "run")
    world, parallel = SAVED_ON
    run = resume_work.make_run(str(model), parallel, str(tmp_path / "run"), iterations=7)
    resumed = ranks.run(resume_work.train_run, world, run, str(shield))[0]["history"]
    assert resumed == {i: quiet[i] for i in (5, 6, 7)}


@pytest.mark.slow
@pytest.mark.parametrize("name,options", [("hft", {"special_tokens": False}), ("s2ft", {"down": 0.2, "output": 0.25})])
def test_methods_train_alike_on_every_mesh(name, options, models, ranks, tmp_path):  # noqa: F811
    """HFT freezes whole experts, S2FT the routers."""
    model, first = models("qwen3-moe-mixed"), None
    for label in ("TP1", "TP2+SP, DP2, EP2"):
        world, parallel = MESHES[label]
        given = {**options, "directory": str(tmp_path / label)}
        found = ranks.run(methods_work.method_steps, world, str(model), parallel, 4, name, **given)[0]["history"]
        first = first or found
        np.testing.assert_allclose([step[:2] for step in found], [step[:2] for step in first], rtol=2e-5)


@pytest.mark.slow
def test_regularized_training_is_alike_on_every_mesh(models, ranks, tmp_path):  # noqa: F811
    model = models("qwen3-moe")
    shield, found = random_shield(model, tmp_path / "shield.safetensors"), {}
    for label in FEW:
        world, parallel = MESHES[label]
        options = {"l2": 0.5, "kl": 0.2}
        answers = ranks.run(regularize_work.train_regularized, world, str(model), parallel, 4, options, str(shield))
        found[label] = [[step[k] for k in ("loss", "grad_norm", "l2", "kl")] for step in answers[0]["history"]]
        np.testing.assert_allclose(found[label][1:], found["TP1"][1:], rtol=1e-4, err_msg=label)


def test_update_norms_count_every_weight_once(models, ranks, tmp_path):  # noqa: F811
    model = models("qwen3-moe")
    shield = random_shield(model, tmp_path / "shield.safetensors")
    for label in FEW:
        world, parallel = MESHES[label]
        run = resume_work.make_run(str(model), parallel, str(tmp_path / label))
        found, whole = ranks.run(resume_work.compare_update_norms, world, run, str(shield))[0]
        assert found.keys() == whole.keys() and "update_norm_router" in found
        assert found == pytest.approx(whole, rel=1e-3), label


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"expert": 2}, {"expert": 2, "pipeline": 2}], ids=["EP2", "PP2, EP2"])
def test_a_stock_loop_is_the_trainer(parallel, models, ranks, tmp_path):  # noqa: F811
    """A shield on megatron-core's own model, optimizer and loop."""
    model, world = models("mixtral"), 2 * parallel.get("pipeline", 1)
    shield = random_shield(model, tmp_path / "shield.safetensors")
    own = {"shield_file": str(shield), "target": str(tmp_path / "own"), "fused_adam": False}
    ours = experts(mesh(1, parallel.get("pipeline", 1)), 2)
    wanted = ranks.run(work.train_steps, world, str(model), ours, 6, **own)[0]["history"]
    arguments = (str(model), parallel, [lr for *_, lr in wanted], str(shield), str(tmp_path / "stock"))
    found = ranks.run(library_work.train, world, *arguments, changes=library_work.MIXTRAL)[0]["history"]
    np.testing.assert_allclose([step[0] for step in found], [step[0] for step in wanted], atol=1e-5)
    np.testing.assert_allclose([step[1] for step in found], [step[1] for step in wanted], rtol=1e-4)
    assert verify(model, tmp_path / "stock", shield).ok


def test_the_library_scores_experts_on_the_mesh_that_is_there(ranks, tmp_path):
    model = make_model("mixtral", tmp_path / "model", vocab_size=384, num_hidden_layers=2)
    make_instruct_tokenizer(model, "llama-3")
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"text": f"Line {i} says what {i * i} is."}) + "\n" for i in range(8)))
    alone = ssu.score(model, calibration=chats, scores=["wanda"], samples=8, sequence_length=32).tensors
    for found, refused in ranks.run(library_work.score_experts, 2, str(model), str(chats)):
        assert set(found) == set(alone)
        for key, values in found.items():
            np.testing.assert_allclose(values, alone[key], rtol=1e-5, atol=1e-6 * np.abs(alone[key]).max(), err_msg=key)
        assert "config.sequence_parallel must be true" in refused


def test_layers_without_experts_are_as_wide_as_config_says(models):  # noqa: F811
    shapes = {k: v.shape for k, v in load_file(models("qwen3-moe-mixed") / "model.safetensors").items()}
    assert "model.layers.3.mlp.up_proj.weight" in shapes and "model.layers.1.mlp.gate.weight" in shapes
    config = json.loads((models("qwen3-moe-mixed") / "config.json").read_text())
    assert shapes["model.layers.0.mlp.up_proj.weight"][0] == config["intermediate_size"]
