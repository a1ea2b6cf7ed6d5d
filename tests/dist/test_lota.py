"""LoTA's probe: what it leaves behind, what it reads, and when its shield is taken for another run's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_ssu.errors import STATUS_NOT_FINITE
from tests.dist import lota_work as work
from tests.dist.methods_work import STEPS
from tests.dist.test_methods import make_world

ROOT = Path(__file__).resolve().parents[2]
LOTA, SSU = (str(ROOT / "examples" / "methods" / f"{name}.yaml") for name in ("lota", "ssu"))
PROBE = 2
SHORT = [f"method.lota.iterations={PROBE}"]
OVERLAP = ["parallel.ddp.overlap_grad_reduce=true", "parallel.ddp.overlap_param_gather=true"]
DROPOUT = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("lota"))
    shutil.copytree(folder / "hf" / "source", folder / "hf" / "bf16")
    AutoModelForCausalLM.from_pretrained(folder / "hf" / "source", dtype=torch.bfloat16).save_pretrained(
        folder / "hf" / "bf16"
    )
    return folder


@pytest.fixture(scope="module")
def begun(ranks, world):
    """Losses of a run with dropout, in runs/begun; other tests take its shield."""
    return ranks.run(work.losses, 1, LOTA, str(world), [*SHORT, *DROPOUT], "begun")[0]


@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        (1, []),
        (2, ["model.path=hf/bf16", "precision.dtype=bf16", *OVERLAP]),
    ],
    ids=["fp32", "bf16-DP2-overlap"],
)
def test_nothing_of_the_probe_is_left_when_the_model_is_built_anew(ranks, world, size, overrides):
    found = ranks.run(work.left_of_the_probe, size, LOTA, str(world), [*SHORT, *overrides], f"left-{size}")
    for state in found:
        assert state["watched"] > 10 and state["objects"] == [] and state["bytes"] == {}


def test_a_probe_may_be_longer_than_the_run(ranks, world):
    """The run after it reads what a run without a probe reads: one with the probe's shield has its losses."""
    blend = ["data.train=[{path: world/target_train.jsonl, weight: 2.0}, {path: world/source_valid.jsonl}]"]
    longer = ranks.run(work.losses, 1, LOTA, str(world), [f"method.lota.iterations={3 * STEPS}", *blend], "longer")[0]
    given = [
        *("shield.file=runs/longer/shield.safetensors", "data.loader_workers=0", "data.source_valid=", *blend),
        *(
            "model.path=hf/source",
            "precision.dtype=fp32",
            "train.optimizer.lr=6.0e-4",
            "train.optimizer.adam_beta2=0.95",
        ),
    ]
    alone = ranks.run(work.losses, 1, SSU, str(world), given, "given")[0]
    assert sorted(longer) == list(range(1, STEPS + 1)) and longer == alone


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.seed=5", "data.seed was 1234 when its probe ran and is 5 now"),
        ("data.train=world/source_valid.jsonl", "its documents' digests"),
        ("train.optimizer.adam_beta2=0.9", "train.optimizer.adam_beta2 was 0.95"),
        ("train.global_batch_size=4", "train.global_batch_size was 8"),
    ],
)
def test_a_shield_of_another_probe_is_refused(ranks, world, begun, override, said):
    name = f"other-{override.partition('=')[0]}"
    message = ranks.run(work.refused, 1, LOTA, str(world), [*SHORT, *DROPOUT, override], name, "begun")[0]
    assert said in message and "change it back" in message and "\n" not in message


def test_a_run_begun_again_under_its_shield_is_the_same(ranks, world, begun):
    """The probe takes no random number from the run; the run's own learning rate, clipping and mesh make no other probe."""
    assert ranks.run(work.begun_again, 1, LOTA, str(world), [*SHORT, *DROPOUT], "again", "begun")[0] == begun
    others = ["train.optimizer.lr=1e-4", "train.optimizer.clip_grad=0.3", "train.micro_batch_size=1"]
    assert ranks.run(work.refused, 2, LOTA, str(world), [*SHORT, *DROPOUT, *others], "rates", "begun") == [""] * 2


def test_a_probe_that_diverges_stops_the_run(ranks, world):
    overrides = ["method.lota.iterations=4", "method.lota.lr=1e30"]
    for status, line, shield in ranks.run(work.stopped, 2, LOTA, str(world), overrides, "diverges"):
        assert status == STATUS_NOT_FINITE and "\n" not in line and not shield
        assert "iteration 2 of its probe, samples 8 to 15" in line and "method.lota.lr" in line
