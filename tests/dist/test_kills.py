"""Ranks killed at random, in steps and in saves: the run that is started again each time ends with the quiet run's bits.

The ranks are forked from one process that has imported everything, so that a start costs a fraction of a second.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.dist.test_shielded_training import random_shield
from tests.models import make_model

KILLS = int(os.environ.get("MEGATRON_SSU_KILLS", "10"))
RANKS, INTERVAL = 2, 3


class Nursery:
    """A process that forks ranks on request; one line of JSON in, one out."""

    def __init__(self, log: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-m", "tests.dist.kill_work"]
        self._log = log.open("w")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self._ask({})

    def _ask(self, order: dict) -> dict:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, **order) -> list[int]:
        """Process ids of the ranks."""
        return self._ask({"start": order})["pids"]

    def wait(self, *, kill_rest: bool) -> list[int]:
        """Statuses of all ranks; with `kill_rest` all end as soon as one has failed, as under torchrun."""
        return self._ask({"wait": kill_rest})["statuses"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._log.close()


@pytest.fixture
def nursery(tmp_path):
    found = Nursery(tmp_path / "log")
    yield found
    found.close()


def latest(directory):
    file = directory / "checkpoints" / "latest"
    return int(file.read_text()) if file.exists() else 0


def reached(directory):
    """The last iteration in the metrics."""
    file = directory / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    found = 0
    for line in lines:
        try:
            found = json.loads(line)["iteration"]
        except ValueError:  # cut by the kill
            continue
    return found


def forget_after(directory, iteration):
    """Drop later metrics, as the next start will: until then they would pass for its own."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["iteration"] <= iteration]
    (directory / "metrics.jsonl").write_text("".join(f"{line}\n" for line in kept))


def losses(directory):
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {r["iteration"]: (r["loss"], r["grad_norm"], r["lr"]) for r in records if "grad_norm" in r}


def wait_for_trigger(directory, draw, begin):
    """Until a random moment: some time after the start, in the middle of a step, or in the middle of a save."""
    target = begin + draw.randint(0, INTERVAL + 1)
    in_save = draw.random() < 0.5
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if in_save and any((directory / "checkpoints").glob("*.part")):
            time.sleep(draw.uniform(0, 0.03))
            return "save"
        if not in_save and reached(directory) >= target:
            time.sleep(draw.uniform(0, 0.1))
            return "step"
        time.sleep(0.002)
    raise TimeoutError(f"iteration {target} not reached: {reached(directory)}")


@pytest.mark.parametrize("kills,iterations", [(4, 30), pytest.param(KILLS, 60, marks=pytest.mark.slow)])
def test_kills_at_random_cost_steps_and_no_bit(kills, iterations, nursery, tmp_path):
    model = make_model("olmo2", tmp_path / "model", num_hidden_layers=2)
    shield = str(random_shield(model, tmp_path / "shield.safetensors"))
    order = {"model": str(model), "shield": shield, "world": RANKS, "iterations": iterations, "interval": INTERVAL}
    nursery.start(directory=str(tmp_path / "quiet"), **order)
    assert nursery.wait(kill_rest=False) == [0] * RANKS, (tmp_path / "log").read_text()[-3000:]

    draw, directory, where = random.Random(7), tmp_path / "killed", []
    while len(where) < kills:
        complete = latest(directory)
        if complete > iterations - 3 * INTERVAL:  # too near to the end to be killed: go back, as a user may
            (directory / "checkpoints" / "latest").write_text(f"{INTERVAL}\n")
            complete = INTERVAL
            forget_after(directory, INTERVAL)
        pids = nursery.start(directory=str(directory), **order)
        where.append(wait_for_trigger(directory, draw, complete))
        before, done = latest(directory), reached(directory)
        os.kill(draw.choice(pids), signal.SIGKILL)
        statuses = nursery.wait(kill_rest=True)
        assert -signal.SIGKILL in statuses and 0 not in statuses
        assert latest(directory) >= before >= complete, "a complete checkpoint was lost"
        # One checkpoint may still be on its way to the disk when the next is due.
        assert max(done, complete) - latest(directory) <= 2 * INTERVAL, "more was lost than the steps since"
    assert {"save", "step"} <= set(where)
    nursery.start(directory=str(directory), **order)
    assert nursery.wait(kill_rest=False) == [0] * RANKS, (tmp_path / "log").read_text()[-3000:]

    assert losses(directory) == losses(tmp_path / "quiet") and len(losses(directory)) == iterations
    for rank in range(RANKS):
        assert (directory / f"bits-{rank}").read_text() == (tmp_path / "quiet" / f"bits-{rank}").read_text()
    assert not list((directory / "checkpoints").glob("*.part"))
