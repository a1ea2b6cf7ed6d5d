"""Context parallelism: every rank gets its part of the sequences, and the parts' losses add up."""

from __future__ import annotations

import pytest

from tests.dist import context_work
from tests.dist.test_shielded_training import random_shield
from tests.dist.work import mesh
from tests.models import make_model

MESHES = {
    "CP2": (2, {**mesh(), "context_parallel_size": 2}),
    "CP4": (4, {**mesh(), "context_parallel_size": 4}),
    "TP2xCP2+SP": (4, {**mesh(2, sequence=True), "context_parallel_size": 2}),
    "CP2xDP2": (4, {**mesh(), "context_parallel_size": 2}),
}


@pytest.mark.parametrize("kind", ["olmo2", "llama"])
def test_losses_equal_those_of_one_rank(kind, ranks, tmp_path):
    model = make_model(kind, tmp_path / "model", num_hidden_layers=2)
    shield = str(random_shield(model, tmp_path / "shield.safetensors"))
    alone = ranks.run(context_work.train_steps, 1, str(model), mesh(), 4, shield_file=shield)[0]["history"]
    for name, (world, parallel) in MESHES.items():
        for answer in ranks.run(context_work.train_steps, world, str(model), parallel, 4, shield_file=shield):
            for (loss, norm, _), (other, other_norm, _) in zip(alone, answer["history"], strict=True):
                assert loss == pytest.approx(other, rel=1e-5), name
                assert norm == pytest.approx(other_norm, rel=1e-4), name
