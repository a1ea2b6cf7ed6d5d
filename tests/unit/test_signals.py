"""Requests to stop by signal: what a launcher passes on is not obeyed twice."""

from __future__ import annotations

import signal
import subprocess
import sys

from megatron_ssu.train.signals import StopRequests

PATIENT = """
import os, signal, time
from megatron_ssu.train import signals
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
