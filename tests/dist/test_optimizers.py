"""megatron-core's optimizers beside torch's AdamW over compact parameters: the same trajectory, also after a resume."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from megatron_ssu.shield.verify import verify
from tests.dist import optimizer_work, resume_work, work
from tests.dist.test_shielded_training import random_shield
from tests.dist.work import mesh
from tests.models import make_model

STEPS, HALF = 8, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("olmo2", tmp_path_factory.mktemp("model") / "model", torch.bfloat16)


@pytest.fixture(scope="module")
def shield(model):
    return str(random_shield(model, model.parent / "shield.safetensors"))


def train(ranks, model, shield, directory, kind):
    run = resume_work.make_run(str(model), mesh(2), str(directory), "bf16", iterations=STEPS, interval=HALF, keep=9)
    return ranks.run(optimizer_work.train, 4, run, shield, kind)[0]["history"]


def half_of(run, directory):
    """A run directory with the checkpoint of half of the steps of another one."""
    name = f"iter_{HALF:07}"
    shutil.copytree(run / "checkpoints" / name, directory / "checkpoints" / name)
    (directory / "checkpoints" / "latest").write_text(f"{HALF}\n")
    return directory


@pytest.fixture(scope="module")
def adamw(ranks, model, shield, tmp_path_factory):
    """The run of torch's AdamW: its directory, and loss and gradient norm by step."""
    directory = tmp_path_factory.mktemp("run")
    return directory, train(ranks, model, shield, directory, "adamw")


def array(history):
    return np.array([history[i][:2] for i in sorted(history)])


@pytest.mark.parametrize("kind", [k for k in optimizer_work.KINDS if k != "adamw"])
def test_another_optimizer_trains_and_resumes(kind, ranks, model, shield, adamw, tmp_path):
    directory, expected = adamw
    # Losses and gradient norms of bf16 weights, whose last bits round otherwise, and otherwise from CPU to CPU.
    tolerance = [2e-2, 2e-2] if "fp16" in kind else [1e-3, 1e-2]
    whole = train(ranks, model, shield, tmp_path / "whole", kind)
    assert (np.abs(array(whole) / array(expected) - 1) < tolerance).all()
    resumed = train(ranks, model, shield, half_of(tmp_path / "whole", tmp_path / "resumed"), kind)
    assert sorted(resumed) == list(range(HALF + 1, STEPS + 1))
    assert {i: whole[i] for i in resumed} == resumed
    taken_over = train(ranks, model, shield, half_of(directory, tmp_path / "taken over"), kind)
    assert (np.abs(array(taken_over) / array(expected)[HALF:] - 1) < tolerance).all()


def test_no_frozen_bit_moves_under_weight_decay_in_the_gradient(ranks, tmp_path):
    model = make_model("olmo2", tmp_path / "model", torch.bfloat16)
    shield, target = random_shield(model, tmp_path / "shield.safetensors"), tmp_path / "adapted"
    options = {"dtype": "bf16", "shield_file": str(shield), "target": str(target)}
    found = ranks.run(
        work.train_steps, 4, str(model), mesh(2), 20, optimizer={"decoupled_weight_decay": False}, **options
    )
    assert all(np.isfinite(norm) for _, norm, _ in found[0]["history"])
    report = verify(model, target, shield)
    assert report.ok and report.totals("column")["moved_trainable"] > 0.99 * report.totals("column")["trainable"]
