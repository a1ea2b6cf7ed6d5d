"""Wholly frozen weights, whose compact tensors are empty: multi-tensor kernels never see them, and nothing else changes."""

from __future__ import annotations

import pytest

from tests.dist import empty_work
from tests.models import make_model

STEPS = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("olmo2", tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def shield(model):
    path = model.parent / "shield.safetensors"
    empty_work.frozen_shield(str(model)).save(path)
    return str(path)


@pytest.mark.parametrize("options", [{}, {"optimizer": {"loss_scale": 8.0}}], ids=["", "scaled"])
def test_kernels_never_get_an_empty_tensor(options, ranks, model, shield):
    lenient, strict = (
        ranks.run(empty_work.train, 1, str(model), shield, STEPS, strict=s, **options)[0] for s in (False, True)
    )
    for found, wanted in zip(strict, lenient, strict=True):
        assert found == pytest.approx(wanted, rel=1e-6)  # the norm's sum has another order


def test_a_rank_with_nothing_but_frozen_weights_takes_part(ranks, model):
    path = model.parent / "everything.safetensors"
    empty_work.frozen_shield(str(model), everything=True).save(path)
    history = ranks.run(empty_work.train, 1, str(model), str(path), STEPS, strict=True)[0]
    assert [norm for _, norm, _ in history] == [0.0] * STEPS


def test_compact_gradients_are_freed_after_the_step(ranks, model, shield):
    mains, left = ranks.run(empty_work.gradients_after_a_step, 1, str(model), shield)[0]
    assert mains > 10 and left == 0
