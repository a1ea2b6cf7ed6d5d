"""Resuming: the bits of the run that never stopped on the same mesh, its losses on another one."""

from __future__ import annotations

import shutil
import signal

import numpy as np
import pytest
import torch

from tests.dist import frozen_work
from tests.dist import resume_work as work
from tests.dist.test_shielded_training import random_shield
from tests.dist.work import mesh
from tests.models import make_model

MESHES = {
    "tp2pp2": mesh(2, 2),
    "dp4": mesh(),
    "tp4": mesh(4),
    "pp4": mesh(1, 4),
    "pp2vp2": mesh(1, 2, 2),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("olmo2", tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def shield(model, tmp_path_factory):
    return str(random_shield(model, tmp_path_factory.mktemp("shield") / "shield.safetensors"))


def same(quiet, resumed, first):
    """All ranks: history from iteration `first` on, weights, main weights and moments, to the bit."""
    for a, b in zip(quiet, resumed, strict=True):
        assert sorted(b["history"]) == list(range(first, max(a["history"]) + 1))
        # Where nothing trains there is no learning rate either.
        assert all(np.array_equal(a["history"][i], b["history"][i], equal_nan=True) for i in b["history"])
        for what in ("weights", "moments"):
            assert len(a[what]) == len(b[what])
            assert all(torch.equal(x, y) for x, y in zip(a[what], b[what], strict=True))


@pytest.mark.parametrize(
    "parallel, dtype, options",
    [
        (mesh(2, 1), "fp32", {}),
        (mesh(2, 2), "bf16", {"async_save": True}),
        (mesh(1, 2, 2), "bf16", {"ddp": {"overlap_grad_reduce": True, "overlap_param_gather": True}}),
    ],
    ids=["tp2", "tp2pp2-async", "vpp-overlap"],
)
def test_same_mesh_gives_the_bits_of_the_quiet_run(parallel, dtype, options, ranks, shield, tmp_path):
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    model = make_model("olmo2", tmp_path / "model", torch_dtype)
    shield = random_shield(model, tmp_path / "shield.safetensors")

    def run(name):
        return work.make_run(str(model), parallel, str(tmp_path / name), dtype, interval=3, **options)

    quiet = ranks.run(work.train_run, 4, run("quiet"), str(shield))
    stopped = ranks.run(work.train_run, 4, run("stopped"), str(shield), kick=(2, 4, signal.SIGUSR1))
    assert {answer["stopped"][0] for answer in stopped} == {75} and max(stopped[0]["history"]) == 4
    assert "SIGUSR1" in stopped[0]["stopped"][1] and "iter_0000004" in stopped[0]["stopped"][1]
    same(quiet, ranks.run(work.train_run, 4, run("stopped"), str(shield)), 5)


# From every mesh to two others, and to every mesh from two others; to the same mesh: the test above.
PAIRS = [(name, [*MESHES][(place + step) % len(MESHES)]) for place, name in enumerate(MESHES) for step in (1, 3)]
FEW = [("tp2pp2", "dp4"), ("dp4", "pp2vp2")]


@pytest.mark.parametrize("pairs", [FEW, pytest.param(PAIRS, marks=pytest.mark.slow)], ids=["few", "all"])
def test_a_run_goes_on_from_another_mesh(pairs, ranks, model, shield, tmp_path):
    quiet = {}
    for name in dict.fromkeys(name for name, _ in pairs):
        parallel = MESHES[name]
        run = work.make_run(str(model), parallel, str(tmp_path / name), micro_batch_size=2)
        quiet[name] = ranks.run(work.train_run, 4, run, shield)[0]["history"]
        folder = tmp_path / name / "checkpoints"
        (folder / "latest").write_text("4\n")
    for name, other in pairs:
        directory = tmp_path / f"{name}-{other}"
        shutil.copytree(tmp_path / name, directory)
        run = work.make_run(str(model), MESHES[other], str(directory), micro_batch_size=2)
        resumed = ranks.run(work.train_run, 4, run, shield)[0]["history"]
        assert sorted(resumed) == [5, 6, 7, 8]
        was, now = (np.array([h[i][:2] for i in sorted(resumed)]) for h in (quiet[name], resumed))
        assert (np.abs(was - now)[:, 0] <= 1e-6 * was[:, 0]).all(), (name, other)
        assert np.allclose(was[:, 1], now[:, 1], rtol=1e-5, atol=0), (name, other)


@pytest.mark.parametrize(
    "frozen,parallel", [("stage", mesh(1, 2)), ("rank", mesh(2)), ("all", mesh(1, 2))], ids=["stage", "rank", "all"]
)
def test_ranks_without_trainable_weights(frozen, parallel, ranks, model, tmp_path):
    """A stage, a tensor-parallel rank or the whole model all frozen: nothing to keep in the optimizer, and checkpoints that
    load."""
    if frozen == "rank":
        shield = frozen_work.one_rank_shield(str(model))
    else:
        shield = frozen_work.frozen_shield(
            str(model), r"layers\.[23]\.|lm_head|model\.norm" if frozen == "stage" else "."
        )
    path = tmp_path / "shield.safetensors"
    shield.save(path)

    def run(name):
        return work.make_run(str(model), parallel, str(tmp_path / name))

    quiet = ranks.run(work.train_run, 4, run("quiet"), str(path))
    # The tensor-parallel rank has padding alone: zeros, but for the counts of steps.
    assert [any(t.any() for t in answer["moments"] if t.dim()) for answer in quiet] == {
        "stage": [True, True, False, False],
        "rank": [True, False, True, False],
        "all": [False] * 4,
    }[frozen]
    assert [bool(answer["moments"]) for answer in quiet] == {
        "stage": [True, True, False, False],
        "rank": [True] * 4,
        "all": [False] * 4,
    }[frozen]
    ranks.run(work.train_run, 4, run("stopped"), str(path), kick=(0, 4, signal.SIGTERM))
    same(quiet, ranks.run(work.train_run, 4, run("stopped"), str(path)), 5)


def test_what_may_change_and_what_may_not(ranks, model, shield, tmp_path):
    def run(**options):
        parallel = options.pop("parallel", mesh(1, 2))
        return work.make_run(str(model), parallel, str(tmp_path / "run"), **{"iterations": 4, **options})

    ranks.run(work.train_run, 2, run(), shield)
    for options, name in (
        ({"data_seed": 2}, "data.seed was 1"),
        ({"global_batch_size": 16}, "train.global_batch_size was 8"),
        ({"seed": 7}, "train.seed was 1234"),
    ):
        with pytest.raises(Exception, match=name) as caught:
            ranks.run(work.train_run, 2, run(**options), shield)
        assert caught.value.kind == "UserError" and "\n" not in caught.value.message and caught.value.agreed
    with pytest.raises(Exception, match=r"shield\.file") as caught:
        ranks.run(work.train_run, 2, run())
    longer = ranks.run(work.train_run, 1, run(iterations=6, parallel=mesh(), lr=5e-4, micro_batch_size=4), shield)
    assert sorted(longer[0]["history"]) == [5, 6]
    assert longer[0]["steps"] == 6


def test_keep_and_latest(ranks, model, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    run = work.make_run(str(model), mesh(), str(tmp_path / "run"), interval=2, keep=2)
    ranks.run(work.train_run, 1, run)
    assert sorted(p.name for p in folder.iterdir()) == ["iter_0000006", "iter_0000008", "latest"]
    assert (folder / "latest").read_text() == "8\n"
