"""Meshes and shields: from one scores file every mesh plans the same bytes, the scores of two meshes agree within a stated
tolerance, and two fp32 shields differ in units at the cut alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ssu.scoring.registry import SCORES
from megatron_ssu.scoring.scores_file import Scores
from megatron_ssu.shield.plan import PlanOptions, plan_shield
from megatron_ssu.shield.ranking import axis_scores, element_scores
from tests.dist import score_work
from tests.dist.work import mesh
from tests.models import make_model

MESHES = {
    "TP1": (1, mesh()),
    "TP2": (2, mesh(2)),
    "TP4": (4, mesh(4)),
    "PP2": (2, mesh(1, 2)),
    "DP2": (2, mesh()),
    "TP2xPP2xDP2": (8, mesh(2, 2)),
    "TP2+SP": (2, mesh(2, sequence=True)),
    "TP4+SP": (4, mesh(4, sequence=True)),
    "PP2xVPP2": (2, mesh(1, 2, 2)),
}
FEW = {name: MESHES[name] for name in ("TP1", "TP2+SP", "TP2xPP2xDP2")}
meshes_few_and_all = pytest.mark.parametrize("meshes", [FEW, MESHES], ids=["few", "all"])
kinds_and_meshes = pytest.mark.parametrize(
    "kind,meshes", [("olmo2", FEW), ("olmo2", MESHES), ("llama", FEW)], ids=["olmo2-few", "olmo2-all", "llama-few"]
)
SOURCE = Path(__file__).parents[3] / "shared" / "data" / "olmo2-tiny-source"


def tolerance(score):
    """Relative, between two meshes in fp32, as docs/shields.md states it."""
    return 1e-3 if score == "fisher" else 1e-5


def check_scores(scores, first, label, of_largest=0.0):
    """`of_largest`: a difference that is tolerated, as a part of the largest value of a tensor."""
    for key, value in first.tensors.items():
        rtol, atol = tolerance(key.partition("/")[0]), of_largest * np.abs(value).max()
        np.testing.assert_allclose(scores.tensors[key], value, rtol=rtol, atol=atol, err_msg=f"{label} {key}")


def check_cut(first, other, one, two, weights, choice, label):
    """Every unit on which shields `one` and `two` differ lies near the cut of its matrix, by the scores of `first`."""
    for name, mask in one.masks.items():
        a, b = mask.bits().reshape(-1), two.masks[name].bits().reshape(-1)
        # A layerwise budget ends in whole units, of which rounding may give one to another matrix.
        assert abs(int(a.sum()) - int(b.sum())) <= (choice.budget == "layerwise"), (label, name)
        differing = np.flatnonzero(a != b)
        if not differing.size or choice.score == "random":
            assert not differing.size, (label, name)
            continue
        matrix = first.matrices[name]
        if matrix.kind == "norm":
            continue
        if choice.granularity == "element":
            values = element_scores(first, choice.score, matrix, weights).reshape(-1).astype(np.float64)
        else:
            values = axis_scores(first, choice.score, choice.granularity, matrix, 0)
        cut = values[a].min()
        extra = abs(int(a.sum()) - int(b.sum()))  # units between the two cuts of a layerwise budget
        far = np.abs(values[differing] - cut) > 5 * tolerance(choice.score) * cut
        assert int(far.sum()) <= extra, (label, name, values[differing], cut)


def check_meshes(ranks, model, meshes, names=score_work.NAMES):
    """Returns the shields of the first mesh by score-granularity-budget."""
    first, shields = None, {}
    weights = load_file(model / "model.safetensors").__getitem__
    choices = {
        f"{n}-{g}-{b}": PlanOptions(score=n, granularity=g, budget=b, norms="half")
        for n in names
        for g in score_work.GRANULARITIES
        for b in ("uniform", "layerwise")
        if g in SCORES[n].granularities
    }
    whole = {
        f"{n}-{g}-{end}": PlanOptions(score=n, granularity=g, freeze=end)
        for n in names
        for g in ("matrix", "layer")
        for end in ("highest", "lowest")
    }
    for label, (world, parallel) in meshes.items():
        scores = ranks.run(score_work.mesh_scores, world, str(model), parallel, names)[0]
        if first is None:
            first = scores
        check_scores(scores, first, label)
        for key, choice in choices.items():
            shield = plan_shield(scores, choice, method="ssu", weights=weights)
            shields.setdefault(key, shield)
            if label != "TP1":
                check_cut(first, scores, shields[key], shield, weights, choice, f"{label} {key}")
        for key, choice in whole.items():
            shield = plan_shield(scores, choice, method="ssu")
            assert shields.setdefault(key, shield).digest() == shield.digest(), (label, key)
    return shields


@kinds_and_meshes
def test_shields_of_two_meshes_differ_at_the_cut_alone(kind, meshes, ranks, tmp_path):
    model = make_model(kind, tmp_path / "model")
    made = check_meshes(ranks, model, meshes)
    assert len({shield.digest() for shield in made.values()}) > 25  # choices differ; a few agree


def test_shields_of_a_trained_model_differ_at_the_cut_alone(ranks):
    if not SOURCE.exists():
        pytest.skip(f"no model in {SOURCE}")
    check_meshes(ranks, SOURCE, {k: MESHES[k] for k in ("TP1", "TP2", "TP2xPP2xDP2", "TP2+SP")})


@meshes_few_and_all
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_from_one_scores_file_every_mesh_plans_the_same_bytes(dtype, meshes, ranks, tmp_path):
    model = make_model("olmo2", tmp_path / "model", getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[dtype]))
    ranks.run(score_work.scores_file, 2, str(model), mesh(2), str(tmp_path / "scores.safetensors"))
    assert Scores.load(tmp_path / "scores.safetensors").scores == sorted(score_work.NAMES)
    for granularity in score_work.GRANULARITIES:
        made = set()
        for label, (world, parallel) in meshes.items():
            folder = tmp_path / granularity / label
            ranks.run(
                score_work.planned,
                world,
                str(model),
                parallel,
                str(folder),
                dtype,
                scores=str(tmp_path / "scores.safetensors"),
                granularity=granularity,
            )
            made.add((folder / "shield.safetensors").read_bytes())
        assert len(made) == 1, granularity


def change(model, new):
    """Replace every weight of the model by `new(name, weight)`."""
    file = model / "model.safetensors"
    save_file({k: new(k, v).contiguous() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})


@kinds_and_meshes
def test_constant_weights_go_to_the_lower_numbers(kind, meshes, ranks, tmp_path):
    model = make_model(kind, tmp_path / "model")
    change(model, lambda name, w: torch.full_like(w, 0.03 if w.ndim == 2 else 1.0))
    # Constant weights have gradients of zero, of which fisher sees the rounding errors only.
    names = ["wanda", "wanda-released", "magnitude", "magnitude-released", "sparsegpt-diagonal"]
    for label, (world, parallel) in meshes.items():
        scores = ranks.run(score_work.mesh_scores, world, str(model), parallel, names)[0]
        for score in names:
            made = plan_shield(scores, PlanOptions(score=score), method="ssu")
            for name, mask in made.masks.items():
                bits = mask.bits()
                assert bits[: len(bits) // 2].all() and not bits[len(bits) // 2 :].any(), (label, score, name)


@kinds_and_meshes
def test_ties_in_the_cut_are_broken_alike_on_every_mesh(kind, meshes, ranks, tmp_path):
    """The MLP's features are three, each many times over, on all tensor-parallel ranks."""
    model = make_model(kind, tmp_path / "model")
    three = torch.arange(96) % 3

    def repeat(name, w):
        if "gate_proj" in name or "up_proj" in name:
            return w[three]
        return w[:, three] if "down_proj" in name else w

    change(model, repeat)
    name, names = "model.layers.1.mlp.down_proj.weight", [n for n in score_work.NAMES if n not in ("random", "snr")]
    for label, (world, parallel) in meshes.items():
        scores = ranks.run(score_work.mesh_scores, world, str(model), parallel, names)[0]
        for score in names:  # one feature frozen in all its copies, one in its first half
            frozen = plan_shield(scores, PlanOptions(score=score), method="ssu").masks[name].bits()
            counts = sorted(int(frozen[i::3].sum()) for i in range(3))
            assert counts == [0, 16, 32], (label, score)
            half = next(i for i in range(3) if frozen[i::3].sum() == 16)
            assert frozen[half::3][:16].all(), (label, score)
