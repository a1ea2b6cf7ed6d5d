"""FP8 state of delayed scaling in checkpoints, with layers that only look like Transformer Engine's."""

from __future__ import annotations

import pytest
import torch

from megatron_ssu.engine import checkpoint_io
from tests.dist import scaling_work as work
from tests.dist.work import mesh
from tests.models import make_model

HISTORY = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_model("olmo2", tmp_path_factory.mktemp("model") / "model", torch.bfloat16, num_hidden_layers=4))


@pytest.fixture(scope="module")
def saved(ranks, model, tmp_path_factory):
    """A run's directory, and the state that its two tensor-parallel ranks would have after their next reduction."""
    directory = str(tmp_path_factory.mktemp("fp8") / "run")
    first, second = ranks.run(work.save, 2, model, mesh(2), directory, HISTORY)
    assert len(first) == 4 * len(work.LINEAR) * 4 and first.keys() == second.keys()
    assert any(not torch.equal(first[key], second[key]) for key in first)
    return directory, {key: torch.maximum(first[key], second[key]) for key in first}


@pytest.mark.parametrize("parallel", [mesh(2), mesh(1, 2), mesh()], ids=["same", "pp2", "dp2"])
def test_a_run_resumes_with_scales_and_histories(parallel, ranks, model, saved):
    directory, expected = saved
    answers = ranks.run(work.load, 2, model, parallel, directory, HISTORY)
    found = {}
    for values, started in answers:
        assert set(started) == {1}
        assert all(torch.equal(value, expected[key]) for key, value in values.items())
        found |= values
    assert found.keys() == expected.keys()


@pytest.mark.parametrize("history", [2, 7])
def test_a_history_of_another_length(history, ranks, model, saved):
    directory, expected = saved
    values, _ = ranks.run(work.load, 1, model, mesh(), directory, history)[0]
    for key, value in values.items():
        if key.endswith("scale"):
            assert torch.equal(value, expected[key]), key
            continue
        kept = expected[key][:history]
        assert len(value) == history and torch.equal(value[: len(kept)], kept), key
        assert not value[len(kept) :].any()


def test_runs_with_and_without_fp8_resume_from_each_other(ranks, model, saved, tmp_path):
    directory, _ = saved
    assert ranks.run(work.load, 1, model, mesh(), directory, HISTORY, fp8=False)[0] == ({}, [])
    keys = ranks.run(work.save_without, 1, model, mesh(), str(tmp_path / "run"))[0]
    assert keys and not any(key.endswith("_extra_state") for key in keys)
    values, started = ranks.run(work.load, 2, model, mesh(2), str(tmp_path / "run"), HISTORY)[0]
    assert values == {} and set(started) == {0}


def test_metadata_names_nothing_else(saved):
    """All that a real checkpoint's `.metadata` refers to is on the list of what it may."""
    import pickle
    from pathlib import Path

    named = set()

    class Noting(pickle.Unpickler):
        def find_class(self, module, name):
            named.add((module, name))
            return super().find_class(module, name)

    with (Path(saved[0]) / "checkpoints" / "iter_0000001" / ".metadata").open("rb") as stream:
        Noting(stream).load()
    assert named and named <= checkpoint_io._METADATA_NAMES
