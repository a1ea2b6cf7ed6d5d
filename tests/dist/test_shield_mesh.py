"""The shield does not tell on which mesh it was made: equal bytes for every score and granularity."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ssu.shield.file import load_shield
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
SOURCE = Path(__file__).parents[3] / "shared" / "data" / "olmo2-tiny-source"


def check_all_meshes(ranks, model, out, meshes=MESHES, names=score_work.NAMES):
    first = None
    for name, (world, parallel) in meshes.items():
        made = ranks.run(score_work.shields, world, str(model), parallel, str(out), names)[0]
        first = first or made
        assert len(made) == len(names) * 6
        differing = [key for key in first if made[key] != first[key]]
        assert not differing, f"{name}: {differing}"
    return first


@pytest.mark.parametrize("kind", ["olmo2", "llama"])
def test_every_mesh_makes_the_same_shield(kind, ranks, tmp_path):
    model = make_model(kind, tmp_path / "model")
    made = check_all_meshes(ranks, model, tmp_path)
    assert len(set(made.values())) > 25  # choices differ; some agree: sparsegpt-diagonal by element is by column


def test_every_mesh_makes_the_same_shield_of_a_trained_model(ranks, tmp_path):
    if not SOURCE.exists():
        pytest.skip(f"no model in {SOURCE}")
    check_all_meshes(ranks, SOURCE, tmp_path, {k: v for k, v in MESHES.items() if "VPP" not in k and k != "TP4+SP"})


def change(model, new):
    """Replace every weight of the model by `new(name, weight)`."""
    file = model / "model.safetensors"
    save_file({k: new(k, v).contiguous() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["olmo2", "llama"])
def test_constant_weights_go_to_the_lower_numbers(kind, ranks, tmp_path):
    model = make_model(kind, tmp_path / "model")
    change(model, lambda name, w: torch.full_like(w, 0.03 if w.ndim == 2 else 1.0))
    # Constant weights have gradients of zero, of which fisher sees the rounding errors only.
    names = [n for n in score_work.NAMES if n != "fisher"]
    check_all_meshes(ranks, model, tmp_path, names=names)
    for score in ("wanda", "wanda-released", "magnitude", "sparsegpt-diagonal"):
        shield = load_shield(tmp_path / f"{score}-column-uniform.safetensors")
        for mask in shield.masks.values():
            bits = mask.bits()
            assert bits[: len(bits) // 2].all() and not bits[len(bits) // 2 :].any()


@pytest.mark.parametrize("kind", ["olmo2", "llama"])
def test_ties_in_the_cut_are_broken_alike_on_every_mesh(kind, ranks, tmp_path):
    """The MLP's features are three, each many times over, on all tensor-parallel ranks."""
    model = make_model(kind, tmp_path / "model")
    three = torch.arange(96) % 3

    def repeat(name, w):
        if "gate_proj" in name or "up_proj" in name:
            return w[three]
        return w[:, three] if "down_proj" in name else w

    change(model, repeat)
    check_all_meshes(ranks, model, tmp_path)
    for score in score_work.NAMES:
        shield = load_shield(tmp_path / f"{score}-column-uniform.safetensors")
        frozen = shield.masks["model.layers.1.mlp.down_proj.weight"].bits()
        if score != "random":  # one feature frozen in all its copies, one in its first half
            counts = sorted(int(frozen[i::3].sum()) for i in range(3))
            assert counts == [0, 16, 32]
            half = next(i for i in range(3) if frozen[i::3].sum() == 16)
            assert frozen[half::3][:16].all()
