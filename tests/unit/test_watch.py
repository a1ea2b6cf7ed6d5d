"""What a run watches: requests to stop, losses that jump, ranks that stop, what a checkpoint is compared with."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
import torch

from megatron_ssu.errors import UserError
from megatron_ssu.models.family import Dims, family_of
from megatron_ssu.train.faults import SpikeWatch
from megatron_ssu.train.flops import flops_per_token, peak_flops
from megatron_ssu.train.identity import Identity
from megatron_ssu.train.signals import REASONS, STATUS, StopRequests, seconds, verdict
from megatron_ssu.train.watchdog import Heartbeat, describe
from tests.models import make_model


def heartbeat(beat=1, iteration=7, waiting=True, place="loop.py:9"):
    return Heartbeat("node3", beat, iteration, "forward-backward", waiting, place)


def test_a_signal_is_a_vote_and_the_second_is_obeyed():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequests() as requests:
        assert verdict(requests.votes()) is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert verdict(requests.votes()) == "SIGTERM"
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before


def test_usr1_may_come_again():
    with StopRequests() as requests:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert verdict(requests.votes()) == "SIGUSR1"


def test_the_budget_counts_from_the_start_it_is_given():
    with StopRequests(5.0, time.monotonic() - 6.0) as late, StopRequests(5.0) as early:
        assert verdict(late.votes()) == "train.exit_after"
        assert verdict(early.votes()) is None


def test_one_rank_is_enough_and_being_ended_goes_before_going_on():
    votes = [[0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]
    assert verdict([sum(v) for v in zip(*votes, strict=True)]) == "SIGTERM"
    assert set(STATUS) == set(REASONS)


@pytest.mark.parametrize(
    "budget,expected",
    [(110, 6600), (0.5, 30), ("90", 5400), ("01:50:00", 6600), ("2-00:00:30", 172830), (" 0:01:00 ", 60), (None, None)],
)
def test_budgets(budget, expected):
    assert seconds(budget) == expected


@pytest.mark.parametrize("budget", [0, -5, "1:2", "soon", "00:00:00", float("nan"), float("inf"), True])
def test_budgets_that_are_no_time(budget):
    with pytest.raises(UserError, match=r"train\.exit_after: .* is no time"):
        seconds(budget)


def test_a_jump_is_told_once_there_is_something_to_compare_with():
    draw, watch = random.Random(0), SpikeWatch(6.0)
    assert watch.jump(50.0) is None
    watch = SpikeWatch(6.0)
    assert all(watch.jump(3.0 + draw.gauss(0, 0.05)) is None for _ in range(200))
    mean, spread = watch.jump(3.6)
    assert mean == pytest.approx(3.0, abs=0.02) and spread == pytest.approx(0.05, rel=0.3)
    assert watch.jump(float("nan")) is None
    assert watch.jump(1.0) is None, "a loss that falls is no spike"


def test_no_spikes_where_none_are_asked_for():
    watch = SpikeWatch(0.0)
    assert [watch.jump(x) for x in [1.0] * 30 + [1e9]] == [None] * 31


def test_the_rank_whose_heart_stopped_is_named():
    before = {r: heartbeat(beat=4) for r in range(4)}
    after = {r: heartbeat(beat=4 if r == 1 else 6) for r in range(4)}
    assert describe(before, after, 4, 0).startswith(
        "rank 1 is dead or stopped (forward-backward of iteration 7 at loop.py:9"
    )
    del after[3]
    assert "rank 3 is dead or stopped (it never began)" in describe({}, after, 4, 0)


def test_the_rank_that_does_not_wait_is_named():
    before = {r: heartbeat(beat=4) for r in range(3)}
    after = {r: heartbeat(beat=6, waiting=r != 2, place=f"file{r}.py:1") for r in range(3)}
    assert describe(before, after, 3, 0) == "rank 2 hangs (forward-backward of iteration 7 at file2.py:1 on node3)"


def test_the_rank_that_is_behind_is_named():
    before = {r: heartbeat(beat=4) for r in range(3)}
    after = {r: heartbeat(beat=6, iteration=6 if r == 1 else 7, waiting=r != 2) for r in range(3)}
    assert describe(before, after, 3, 0).startswith("rank 1 hangs")


def test_all_alike_blames_nobody():
    beats = {r: heartbeat(beat=4, waiting=False) for r in range(3)}
    later = {r: heartbeat(beat=6, waiting=False) for r in range(3)}
    assert "none is behind the others" in describe(beats, later, 3, 0)


@pytest.mark.parametrize(
    "name,tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
    ],
)
def test_peaks_of_known_gpus(name, tflops):
    assert peak_flops(name) == tflops * 1e12


@pytest.mark.parametrize("name", ["cpu", "NVIDIA GeForce GTX 1080", "NVIDIA H1000"])
def test_no_peak_is_made_up(name):
    assert peak_flops(name) is None


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_six_for_every_weight_that_multiplies(tied, tmp_path):
    import transformers

    path = make_model("llama", tmp_path / "model", tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    hf = model.config.to_dict()
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    attention = 12 * hf["num_hidden_layers"] * hf["hidden_size"] * 64
    assert flops_per_token(family_of(hf), Dims.from_hf(hf), 64) == 6 * weights + attention


def test_a_changed_run_file_is_named():
    saved = {"train.seed": 1, "data.seed": 2, "precision.dtype": "bf16"}
    Identity(dict(saved)).compare(saved, "iter")
    with pytest.raises(UserError, match=r"iter: precision\.dtype was 'bf16' in this checkpoint and is 'fp32' now"):
        Identity({**saved, "precision.dtype": "fp32"}).compare(saved, "iter")
    with pytest.raises(UserError, match=r"raise train\.phase\.number to begin a new phase"):
        Identity({**saved, "data.seed": 3}).compare(saved, "iter")
    Identity({**saved, "data.seed": 3}).compare(saved, "iter", new_phase=True)
    with pytest.raises(UserError, match="was not set in this checkpoint"):
        Identity({**saved, "train.global_batch_size": 4}).compare(saved, "iter")
