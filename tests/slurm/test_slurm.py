"""examples/slurm/train.sbatch on a real SLURM of two small nodes: the time limit, a dead rank, bad input.

Needs root, sbatch, munge and `<repository>/../shared/slurm/start-local-slurm.sh`, which starts that SLURM.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.models import make_model
from tests.unit.data_makers import make_hf_tokenizer, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ROOT.parent / "shared" / "slurm" / "start-local-slurm.sh"
ITERATIONS, INTERVAL = 300, 20
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def missing() -> str | None:
    if not LOCAL.exists():
        return f"{LOCAL} is not there"
    absent = [tool for tool in ("sbatch", "slurmctld", "slurmd", "munged") if not shutil.which(tool)]
    if absent:
        return f"{', '.join(absent)} not installed"
    return None if os.geteuid() == 0 else "starting a local SLURM takes root"


pytestmark = [pytest.mark.slurm, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Environment of commands that talk to the local SLURM; one that ran already goes on running."""
    shown = subprocess.run([LOCAL, "env"], check=True, capture_output=True, text=True).stdout
    conf = re.sub(r"^export SLURM_CONF=", "", shown.strip())
    env = {**os.environ, "SLURM_CONF": conf, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    ran = Path(conf).exists() and subprocess.run(["sinfo"], env=env, capture_output=True, timeout=60).returncode == 0
    # A step must end within the 10 s that the controller waits for an answer: it asks again a minute later, and by then
    # the requeued job has a step of the same number here. (Usually a requeued job waits two minutes.)
    subprocess.run([LOCAL, "start"], env={**env, "LOCAL_SLURM_KILL_WAIT": "5"}, check=True, timeout=120)
    yield env
    if not ran:
        subprocess.run([LOCAL, "stop"], env=env, timeout=120)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model, text and a run file; its runs go there too."""
    folder = tmp_path_factory.mktemp("slurm")
    shutil.copytree(ROOT / "examples" / "slurm", folder / "my jobs")  # a space in the script's path
    make_hf_tokenizer(make_model("olmo2", folder / "model", vocab_size=384, num_hidden_layers=2))
    draw = random.Random(1)
    words = ["the", "word", "was", "short", "columns", "that", "matter", "stay", "others", "learn"]
    write_jsonl(folder / "text.jsonl", [" ".join(draw.choices(words, k=60)) for _ in range(300)])
    (folder / "run.yaml").write_text(
        f"""
model: {{path: {folder}/model}}
parallel: {{tensor_model_parallel_size: 2}}
precision: {{dtype: fp32}}
shield: {{score: magnitude}}
data: {{train: {folder}/text.jsonl, split: "98,2,0", sequence_length: 64, loader_workers: 2, workers: 1}}
train: {{iterations: {ITERATIONS}, micro_batch_size: 2, global_batch_size: 8, eval_interval: 0}}
checkpoint: {{directory: {folder}/runs, interval: {INTERVAL}, keep: 2}}
log: {{interval: 100, tensorboard: false}}
"""
    )
    return folder


class Job:
    """A submitted job and its log."""

    def __init__(self, env: dict[str, str], log: Path, options: list[str], arguments: list[str], ranks: int) -> None:
        self.env, self.file = {**env, "CPU_RANKS": str(ranks), "MAX_STALLED": "20"}, log
        command = [
            "sbatch",
            "--parsable",
            f"--output={log}",
            *options,
            str(log.parent / "my jobs" / "train.sbatch"),
            *arguments,
        ]
        self.number = subprocess.run(command, env=self.env, check=True, capture_output=True, text=True).stdout.strip()

    def log(self) -> str:
        return self.file.read_text() if self.file.exists() else ""

    def shown(self) -> dict[str, str]:
        """scontrol's facts."""
        return dict(re.findall(r"(\w+)=(\S+)", self.control("show", "job", self.number)))

    def control(self, *arguments: str) -> str:
        """scontrol's answer; on a busy machine the controller may not answer at once."""
        for _ in range(5):
            done = subprocess.run(["scontrol", *arguments], env=self.env, capture_output=True, text=True)
            if done.returncode == 0:
                return done.stdout
            time.sleep(1)
        pytest.fail(f"scontrol {' '.join(arguments)}: {done.stderr}")

    def until(self, condition: Callable[[], object], seconds: float) -> None:
        """Wait for it; fail with the log when it does not come, or the job has ended before."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = self.shown()["JobState"] in ENDED
            if (ended and not condition()) or time.monotonic() > deadline:
                pytest.fail(f"job {self.number} {self.shown()['JobState']}:\n{self.log()[-6000:]}")
            time.sleep(0.2)

    def ended(self, seconds: float) -> dict[str, str]:
        self.until(lambda: self.shown()["JobState"] in ENDED, seconds)
        return self.shown()


def latest(directory: Path) -> int:
    file = directory / "checkpoints" / "latest"
    return int(file.read_text()) if file.exists() else 0


def rank_process(rank: int, job: str) -> psutil.Process | None:
    for process in psutil.process_iter(["cmdline"]):
        if any(part.endswith("my jobs/rank.py") for part in process.info["cmdline"] or ()):
            try:
                found = process.environ()
            except psutil.Error:
                continue
            if found.get("RANK") == str(rank) and found.get("SLURM_JOB_ID") == job:
                return process
    return None


def quiet_run(world: Path, env: dict[str, str]) -> subprocess.Popen:
    """The same run on the same mesh, without SLURM and without a stop."""
    options = ["--standalone", "--nproc-per-node", "4", "-m", "megatron_ssu", "train", str(world / "run.yaml")]
    options += [f"checkpoint.directory={world / 'quiet'}", f"checkpoint.export={world / 'quiet-hf'}"]
    with (world / "quiet.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options], env=env, stdout=log, stderr=log
        )


def steps(directory: Path) -> dict[int, tuple[float, float, float]]:
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {r["iteration"]: (r["loss"], r["grad_norm"], r["lr"]) for r in records if "grad_norm" in r}


def test_time_limit_and_a_dead_rank_cost_no_bit(environment, world):
    runs = world / "runs"
    # The limit's signal is sent at SLURM's next look at the clock, half a minute after the start at the latest.
    job = Job(
        environment,
        world / "log",
        ["--nodes=2", "--time=2", "--signal=B:USR1@110"],
        [str(world / "run.yaml"), f"checkpoint.export={world / 'adapted'}"],
        ranks=2,
    )
    job.until(lambda: "the ranks saved and stopped" in job.log(), 300)
    job.control("update", f"JobId={job.number}", "TimeLimit=60")
    stopped = latest(runs)
    assert 0 < stopped < ITERATIONS - 2 * INTERVAL
    quiet = quiet_run(world, environment)  # while the job waits in the queue
    try:
        job.until(lambda: latest(runs) > stopped, 300)
        victim = rank_process(3, job.number)
        assert victim is not None
        victim.send_signal(signal.SIGKILL)
        job.until(lambda: "the ranks died" in job.log(), 120)
        assert latest(runs) < ITERATIONS
        shown = job.ended(300)
        assert quiet.wait(300) == 0, (world / "quiet.log").read_text()[-3000:]
    finally:
        if quiet.poll() is None:
            quiet.terminate()  # torchrun ends its ranks
            quiet.wait(60)

    log = job.log()
    assert shown["JobState"] == "COMPLETED" and int(shown["Restarts"]) >= 2
    for words in (
        "SIGUSR1: the ranks are asked to save and stop",
        f"stopped by SIGUSR1 after iteration {stopped} of {ITERATIONS}",
        f"checkpoint 0 -> {stopped}; putting the job back into the queue",
        f"resuming after iteration {stopped}",
        "the ranks died",
        f"finished at iteration {ITERATIONS}",
    ):
        assert words in log, f"{words!r} is not in:\n{log[-6000:]}"
    names = sorted(path.name for path in (world / "adapted").glob("*.safetensors"))
    assert names and names == sorted(path.name for path in (world / "quiet-hf").glob("*.safetensors"))
    for name in names:
        assert (world / "adapted" / name).read_bytes() == (world / "quiet-hf" / name).read_bytes()
    assert steps(runs) == steps(world / "quiet") and len(steps(runs)) == ITERATIONS
    for node in ("node1", "node2"):
        assert len(list((runs / "slurm" / f"{job.number}-0" / node).glob("*/attempt_0/*/stdout.log"))) == 2
    assert sorted(path.name for path in (runs / "logs").iterdir()) == [f"rank_{rank:05d}.log" for rank in range(4)]


def test_bad_input_ends_the_job_for_good(environment, world):
    run, alone = str(world / "run.yaml"), "parallel.tensor_model_parallel_size=1"
    misspelt = Job(environment, world / "misspelt", ["--nodes=1"], [run, alone, "train.iteratons=3"], ranks=1)
    broken = world / "broken"
    (broken / "checkpoints").mkdir(parents=True)
    (broken / "checkpoints" / "latest").write_text("nonsense\n")
    found = Job(environment, world / "found", ["--nodes=1"], [run, alone, f"checkpoint.directory={broken}"], ranks=1)

    shown = misspelt.ended(120)
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "2:0", "0")
    lines = [line for line in misspelt.log().splitlines() if not line.startswith("[")]
    assert len(lines) == 1 and "train.iteratons" in lines[0] and "did you mean 'iterations'?" in lines[0]

    shown = found.ended(240)  # seen by the ranks only
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "2:0", "0")
    assert (
        "checkpoints/latest: must be the iteration of a checkpoint in " in found.log()
        and "got 'nonsense'" in found.log()
    )
    assert "not put back" in found.log()
