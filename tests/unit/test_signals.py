"""Requests to stop by signal: what a launcher passes on is not obeyed twice."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from megatron_ssu.config.units import seconds
from megatron_ssu.errors import UserError
from megatron_ssu.train.stop_requests import REASONS, STATUS, StopRequests, verdict

PATIENT = """
import os, signal, time
from megatron_ssu.train import stop_requests as signals
with signals.StopRequests() as requests:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    print(requests.votes(), flush=True)
    signals.REPEAT = 0.05
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
"""


def test_the_same_signal_soon_again_is_one_request_and_later_ends_at_once():
    done = subprocess.run([sys.executable, "-c", PATIENT], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[1.0, 0.0, 0.0, 0.0]\n"
    assert done.returncode == -signal.SIGTERM


def test_usr1_may_come_any_time():
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequests() as requests:
        assert not any(requests.votes())
        for _ in range(3):
            signal.raise_signal(signal.SIGUSR1)
        assert requests.votes() == [0.0, 0.0, 1.0, 0.0]
    assert signal.getsignal(signal.SIGUSR1) == before


def test_the_budget_counts_from_the_start_it_is_given():
    with StopRequests(5.0, time.monotonic() - 6.0) as late, StopRequests(5.0) as early:
        assert verdict(late.votes()) == "train.exit_after"
        assert verdict(early.votes()) is None


def test_one_rank_is_enough_and_being_ended_goes_before_going_on():
    votes = [[0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]
    assert verdict([sum(v) for v in zip(*votes, strict=True)]) == "SIGTERM"
    assert set(STATUS) == {*REASONS, "evaluate.stop_when"}


@pytest.mark.parametrize(
    "budget,expected",
    [(110, 6600), (0.5, 30), ("90", 5400), ("01:50:00", 6600), ("2-00:00:30", 172830), (" 0:01:00 ", 60), (None, None)],
)
def test_budgets(budget, expected):
    assert seconds(budget) == expected


@pytest.mark.parametrize("budget", [0, -5, "1:2", "soon", "00:00:00", float("nan"), float("inf"), True])
def test_budgets_that_are_no_time(budget):
    with pytest.raises(UserError, match=r"train\.exit_after: must be minutes"):
        seconds(budget)
