"""examples/two-phases.yaml on a small world, killed at random: started again, it ends with the bits of a quiet run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from examples.demo.make_model import make_model, make_tokenizer
from examples.two_phases import tasks
from tests.dist.test_kills import reached

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 12  # of either phase
TRAIN = [sys.executable, "-m", "megatron_ssu", "train", "two-phases.yaml"]
FIRST, SECOND = "runs/two/phases/1-english", "runs/two/phases/2-language"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with texts, instructions, an untrained model and the example's run file with fewer steps."""
    folder = tmp_path_factory.mktemp("two-phases")
    world, start = folder / "world", folder / "hf" / "base"
    tasks.write_world(world, 7, tasks.WorldSize(200, 200, 20, 100, 10))
    tasks.write_tasks(world, 7, tasks.Size(train=200, heldout=10))
    tokenizer = make_tokenizer(world)
    make_model(tokenizer, 0).save_pretrained(start)
    tokenizer.save_pretrained(start)
    run = yaml.safe_load((EXAMPLES / "two-phases.yaml").read_text())
    run["checkpoint"]["interval"] = 3
    run["train"]["eval_interval"] = 4
    english, language = run["phases"]
    english["train"]["iterations"] = language["train"]["iterations"] = STEPS
    language["shield"]["calibration"]["samples"] = 16
    # An untrained model does not end its answers.
    language["replay"]["generate"] |= {"samples": 40, "batch_size": 4, "filter": {"ends": False, "max_repetition": 1.0}}
    (folder / "two-phases.yaml").write_text(yaml.safe_dump(run))
    return folder


def start(folder, log):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    return subprocess.Popen(TRAIN, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)


def moments(folder, draw):
    """Conditions to kill at, over the whole run: steps of both phases, saves, and answers that are being written."""
    for phase in (FIRST, SECOND):
        if phase == SECOND:
            yield lambda: any((folder / SECOND).glob("replay.jsonl*"))
            yield lambda: (folder / SECOND / "shield.safetensors").exists()
        for step in sorted(draw.sample(range(1, STEPS), 2)):
            yield lambda phase=phase, step=step: reached(folder / phase) >= step


def test_kills_at_random_leave_the_same_bits(world, tmp_path):
    folders = {name: tmp_path / name for name in ("quiet", "killed")}
    for folder in folders.values():
        shutil.copytree(world, folder)
    draw, kills, log = random.Random(11), 0, (tmp_path / "log").open("w+")
    assert start(folders["quiet"], log).wait(600) == 0, (tmp_path / "log").read_text()[-3000:]
    for reaches in moments(folders["killed"], draw):
        process = start(folders["killed"], log)
        while process.poll() is None and not reaches():
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.3))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    assert kills >= 4
    assert start(folders["killed"], log).wait(600) == 0, (tmp_path / "log").read_text()[-3000:]
    for file in (f"{FIRST}/model/model.safetensors", f"{SECOND}/model/model.safetensors", f"{SECOND}/replay.jsonl"):
        assert (folders["quiet"] / file).read_bytes() == (folders["killed"] / file).read_bytes(), file
