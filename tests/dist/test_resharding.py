"""What every kind of shield leaves in a checkpoint, and that it resumes on another mesh."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
from megatron.core import dist_checkpointing

from megatron_ssu.shield.mask import Mask
from megatron_ssu.shield.shield_file import Shield, load_shield
from tests.dist import resume_work as work
from tests.dist.test_shielded_training import random_shield
from tests.dist.work import mesh
from tests.models import make_model

SAVED_ON = mesh(2, 2)  # of 8 ranks
LOADED_ON = {"TP1": (1, mesh()), "TP4": (4, mesh(4)), "DP2": (2, mesh()), "PP2xVPP2": (2, mesh(1, 2, 2))}
PREFIX = "optimizer.state."
FREE = [f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]
FREE += ["lm_head.weight"]
FROZEN = ["model.layers.1.mlp.down_proj.weight"]
PINNED = "model.layers.3.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("olmo2", tmp_path_factory.mktemp("model") / "model")


def shield_with(model, granularity, path):
    """A random one, but layers differ: of layer 0's query, up and down projections, of which two share weights with others,
    nothing is frozen, nor of the head; layer 1's down projection and layer 2's norms are wholly frozen, and of layer 3's
    output projection hardly anything is."""
    drawn = load_shield(random_shield(model, path.with_name("drawn.safetensors"), granularity))
    masks = dict(drawn.masks)
    for name in FREE:
        del masks[name]
    for name in FROZEN:
        masks[name] = Mask.constant(granularity, drawn.matrices[name].shape, True)
    for name, matrix in drawn.matrices.items():
        if matrix.layer == 2 and len(matrix.shape) == 1:
            masks[name] = Mask.constant("element", matrix.shape, True)
    frozen = np.zeros(masks[PINNED].shape if granularity == "element" else masks[PINNED].units, dtype=bool)
    frozen[3] = True
    masks[PINNED] = Mask.of(granularity, masks[PINNED].shape, frozen)
    matrices = {name: drawn.matrices[name] for name in masks}
    shield = Shield("ssu", model.name, drawn.fingerprint, matrices=matrices, masks=masks, granularity=granularity)
    shield.save(path)
    return shield, drawn.matrices


def compact_shapes(shield, matrices):
    """What is stored by the names of matrices."""
    found = {}
    for name, matrix in matrices.items():
        mask = shield.masks.get(name)
        whole = len(matrix.shape) == 1 or name in (PINNED, "lm_head.weight", "model.layers.0.mlp.down_proj.weight")
        if whole or (mask is not None and mask.frozen_units == mask.units):
            continue
        rows, columns = matrix.shape
        if mask is not None and mask.granularity == "column":
            columns -= mask.frozen_units
        if mask is not None and mask.granularity == "row":
            rows -= mask.frozen_units
        found[name] = (rows, columns)
    return found


@pytest.fixture(scope="module")
def saved(ranks, model, tmp_path_factory):
    """By kind of shield (None: no shield): a run's directory at iteration 4, its shield, all losses and norms of the run."""
    made = {}

    def run(granularity):
        if granularity not in made:
            folder = tmp_path_factory.mktemp(str(granularity))
            file, shield = None, (None, None)
            if granularity:
                file = str(folder / "shield.safetensors")
                shield = shield_with(model, granularity, folder / "shield.safetensors")
            options = work.make_run(str(model), SAVED_ON, str(folder / "run"), iterations=7)
            history = ranks.run(work.train_run, 8, options, file)[0]["history"]
            (folder / "run" / "checkpoints" / "latest").write_text("4\n")
            made[granularity] = folder / "run", file, shield, history
        return made[granularity]

    return run


@pytest.mark.parametrize("name", LOADED_ON)
@pytest.mark.parametrize("granularity", ["column", "row", "element", None])
def test_a_run_resumes_on_another_mesh(granularity, name, ranks, model, saved, tmp_path):
    directory, file, _, quiet = saved(granularity)
    shutil.copytree(directory, tmp_path / "run")
    world, parallel = LOADED_ON[name]
    run = work.make_run(str(model), parallel, str(tmp_path / "run"), iterations=7)
    resumed = ranks.run(work.train_run, world, run, file)[0]["history"]
    assert sorted(resumed) == [5, 6, 7]
    was, now = (np.array([history[i] for i in sorted(resumed)]) for history in (quiet, resumed))
    assert (np.abs(was - now)[:, 0] <= 1e-6 * was[:, 0]).all()
    assert np.allclose(was[:, 1], now[:, 1], rtol=1e-5, atol=0)
    assert (was[:, 2] == now[:, 2]).all()


@pytest.mark.parametrize("granularity", ["column", "row", "element"])
def test_no_frozen_column_or_row_is_stored(granularity, model, saved):
    """The optimizer's tensors are [O, K] and [R, I]; [O, I] for elements. Nothing is stored of what is wholly frozen."""
    directory, _, (shield, matrices), _ = saved(granularity)
    found = dist_checkpointing.load_tensors_metadata(str(directory / "checkpoints" / "iter_0000004"))
    optimizer = {key.removeprefix(PREFIX): t.global_shape for key, t in found.items() if key.startswith(PREFIX)}
    compact = compact_shapes(shield, matrices)
    assert (
        all(compact[f"model.layers.{i}.mlp.gate_proj.weight"] != (96, 64) for i in range(4)) or granularity == "element"
    )
    states = ("param", "exp_avg", "exp_avg_sq")
    named = {key: shape for key, shape in optimizer.items() if key.split(".", 1)[1] in matrices}
    assert named == {f"{state}.{name}": shape for state in states for name, shape in compact.items()}
    rest = {key.split(".", 1)[1]: shape for key, shape in optimizer.items() if key not in named}
    assert len(optimizer) == 3 * len(compact) + 3 * len(rest)
    linear = {
        name: shape for name, shape in rest.items() if name.endswith(("weight.0", "weight.3")) and len(shape) == 2
    }
    assert linear == {
        "decoder.layers.mlp.linear_fc2.weight.0": (64, 96),
        "decoder.layers.self_attention.linear_proj.weight.3": (64, 64),
    }
    norms = [m for name, m in matrices.items() if len(m.shape) == 1 and m.layer != 2]
    assert sum(math.prod(shape) for shape in rest.values() if len(shape) == 1) == sum(m.elements for m in norms)
    assert len(rest) == len(linear) + len(norms) + 1  # the head
