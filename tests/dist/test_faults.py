"""Steps that go wrong, disks that fill up, ranks that stop: skipped, told, ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.dist import resume_work as work
from tests.dist.test_shielded_training import random_shield
from tests.dist.work import GLOBAL_BATCH, mesh
from tests.models import make_model
from tests.unit.data_makers import make_hf_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("model") / "model", num_hidden_layers=2)


def bad(iteration):
    """A sample of this iteration."""
    return (iteration - 1) * GLOBAL_BATCH + 3


def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(ranks, model, tmp_path):
    run = work.make_run(str(model), mesh(1, 2), str(tmp_path / "run"), interval=3)
    before = ranks.run(work.train_run, 4, run, kick=(0, 3, signal.SIGUSR1))
    answers = ranks.run(work.train_run, 4, run, poison=(bad(4),), kick=(3, 4, signal.SIGTERM))
    for rank, (a, b) in enumerate(zip(before, answers, strict=True)):
        assert b["stopped"][0] == 143 and list(b["history"]) == [4]
        assert all(torch.equal(x, y) for x, y in zip(a["weights"], b["weights"], strict=True)), rank
        assert all(torch.equal(x, y) for x, y in zip(a["moments"], b["moments"], strict=True)), rank
    assert "step skipped at iteration 4, samples 24 to 31: loss nan" in answers[0]["said"]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in records if r.get("skipped")] == [4]
    rest = ranks.run(work.train_run, 4, run)[0]
    assert rest["stopped"] is None and all(loss == loss for loss, _, _ in rest["history"].values())


def test_too_many_skipped_steps_stop_the_run(ranks, model, tmp_path):
    run = work.make_run(str(model), mesh(), str(tmp_path / "run"), interval=2, max_skipped=3)
    poison = tuple(bad(i) for i in (3, 5, 6, 7))
    answers = ranks.run(work.train_run, 2, run, poison=poison)
    for answer in answers:
        status, message = answer["stopped"]
        assert status == 3 and max(answer["history"]) == 7
        assert "3 steps in a row" in message and "samples 48 to 55" in message and "iter_0000006" in message
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "6\n"


def test_a_checkpoint_before_the_first_step_that_counts(ranks, model, tmp_path):
    """All steps up to it were skipped: there are no moments yet."""
    poison = (bad(1), bad(2))
    quiet = ranks.run(
        work.train_run, 2, work.make_run(str(model), mesh(), str(tmp_path / "quiet"), interval=50), poison=poison
    )
    run = work.make_run(str(model), mesh(), str(tmp_path / "run"), interval=2)
    ranks.run(work.train_run, 2, run, poison=poison, kick=(1, 2, signal.SIGUSR1))
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "2\n"
    for a, b in zip(quiet, ranks.run(work.train_run, 2, run), strict=True):
        assert sorted(b["history"]) == [3, 4, 5, 6, 7, 8]
        assert all(a["history"][i] == b["history"][i] for i in b["history"])
        for what in ("weights", "moments"):
            assert all(torch.equal(x, y) for x, y in zip(a[what], b[what], strict=True))


def start_ranks(folder: Path, ranks: int) -> list[subprocess.Popen]:
    """A long run over text with two loader processes a rank, as `megatron-ssu train` in processes of their own; returned
    once it has taken a few steps."""
    model = make_model("llama", folder / "model", num_hidden_layers=2, vocab_size=321)
    make_hf_tokenizer(model)
    write_jsonl(folder / "text.jsonl", ["Some words that are said again and again. " * 20] * 300)
    run = {
        "model.path": model, "method.name": "none", "data.train": folder / "text.jsonl", "data.sequence_length": 16,
        "data.loader_workers": 2, "train.iterations": 100000, "train.global_batch_size": 2, "precision.dtype": "fp32",
        "checkpoint.directory": folder / "run",
    }  # fmt: skip
    (folder / "run.yaml").write_text(f"model: {{path: {model}}}\ncheckpoint: {{directory: x}}\n")
    command = [sys.executable, "-m", "megatron_ssu", "train", "run.yaml", *(f"{k}={v}" for k, v in run.items())]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    processes = [
        subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})},
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        for rank in range(ranks)
    ]
    metrics, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + 600
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
        gone = [process for process in processes if process.poll() is not None]
        if gone or time.monotonic() > deadline:
            for process in processes:
                process.kill()
            raise AssertionError([process.stderr.read().decode() for process in processes])
        time.sleep(0.05)
    return processes


@pytest.mark.parametrize("again", [False, True])
def test_a_signal_to_all_processes_of_a_rank_leaves_a_checkpoint(again, tmp_path):
    """torchrun and SLURM signal a rank's loader processes too; none may take the rank with it, or stay."""
    (process,) = start_ranks(tmp_path, 1)
    try:
        for _ in range(1 + again):
            os.killpg(process.pid, signal.SIGTERM)
        said = process.communicate(timeout=300)[1].decode()
    finally:
        process.kill()
    assert process.returncode == 143 and "stopped by SIGTERM" in said and "Traceback" not in said, said
    assert int((tmp_path / "run" / "checkpoints" / "latest").read_text()) > 0
    with pytest.raises(ProcessLookupError):  # nobody of the group is left
        os.killpg(process.pid, 0)


def test_a_loader_process_that_is_killed_ends_all_ranks_with_a_line(tmp_path):
    """As the kernel does where memory runs out."""
    processes = start_ranks(tmp_path, 2)
    try:
        victim = psutil.Process(processes[1].pid)
        loader = next(child for child in victim.children() if child.cmdline() == victim.cmdline())
        loader.kill()
        said = [process.communicate(timeout=300)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [4, 4], said
    assert "a data loader process was killed" in said[1] and "data.loader_workers" in said[1]
    assert "rank 1" in said[0]
    assert not any("Traceback" in text for text in said), said


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("where", ["shard", "common", "metadata"])
def test_a_full_disk_leaves_the_checkpoint_before(where, background, ranks, model, tmp_path):
    run = work.make_run(str(model), mesh(), str(tmp_path / "run"), interval=4, async_save=background)
    with pytest.raises(Exception, match="No space left on device") as caught:
        ranks.run(work.fill_disk, 2, run, where, 8)
    assert caught.value.kind == "UserError" and "\n" not in caught.value.message
    assert "iter_0000004, is whole" in caught.value.message
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["iter_0000004", "latest"]
    assert sorted(ranks.run(work.train_run, 2, run)[0]["history"]) == [5, 6, 7, 8]


def test_wall_clock_budget(ranks, model, tmp_path):
    run = work.make_run(str(model), mesh(), str(tmp_path / "run"), exit_after=1e-6)
    answers = ranks.run(work.train_run, 2, run)
    assert [a["stopped"][0] for a in answers] == [75, 75] and "train.exit_after" in answers[0]["stopped"][1]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "1\n"


@pytest.mark.parametrize("granularity", [None, "column", "row", "element"])
def test_update_norms_are_those_of_the_weights(granularity, ranks, model, tmp_path):
    shield = random_shield(model, tmp_path / "shield.safetensors", granularity) if granularity else None
    for world, parallel, padding in ((1, mesh(), 128), (4, mesh(2, 2), 128), (2, mesh(2), 4096)):
        run = work.make_run(str(model), parallel, str(tmp_path / f"run{world}"))
        run.model.make_vocab_size_divisible_by = padding  # 4096: the second rank holds nothing but padding
        computed, measured = ranks.run(work.compare_update_norms, world, run, str(shield) if shield else None)[0]
        assert sorted(computed) == sorted(measured) and len(computed) == 7
        for kind, value in measured.items():
            assert computed[kind] == pytest.approx(value, rel=2e-3), kind


def test_the_hung_rank_is_named(ranks, model, tmp_path):
    run = work.make_run(str(model), mesh(), str(tmp_path / "run"))
    lines = ranks.run(work.hang, 4, run, 2)
    assert lines[2] and "rank 2 hangs" in lines[2] and "resume_work.py" in lines[2]
    assert {line for line in lines if line} == {lines[2]}
