"""What a run tells, where: metrics.jsonl over restarts, console lines, Weights & Biases."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shlex
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
from rich.console import Console

from megatron_ssu.config.schema import CheckpointSection, LogSection, ModelSection, RunConfig, TrainSection
from megatron_ssu.errors import UserError
from megatron_ssu.train.sinks import check_wandb
from megatron_ssu.train.telemetry import Telemetry, log_to_file


def run_of(folder: Path, **log) -> RunConfig:
    return RunConfig(
        model=ModelSection(path="model"),
        train=TrainSection(iterations=4, global_batch_size=2),
        checkpoint=CheckpointSection(directory=str(folder)),
        log=LogSection(interval=2, **{"tensorboard": False, **log}),
    )


def tell(run: RunConfig, iterations: range, start: int = 0) -> str:
    """Steps of 0.5 seconds, the last of which is written as a killed process would leave it; the console's text."""
    console = Console(file=io.StringIO(), width=200)
    telemetry = Telemetry(run, console, active=True, start=start, flops=1e9, peak=1e14)
    for i in iterations:
        record = {"loss": 1.0 / i, "grad_norm": 1.0, "lr": 0.1}
        telemetry.step(i, record, {"forward-backward": 0.4, "optimizer": 0.1})
    telemetry.close()
    return console.file.getvalue()


def test_numbers_of_steps_and_lines_at_the_interval(tmp_path):
    run = run_of(tmp_path)
    text = tell(run, range(1, 5))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    tokens = 2 * run.data.sequence_length / 0.5
    assert [r["iteration"] for r in records] == [1, 2, 3, 4]
    assert all(r["tokens_per_second"] == pytest.approx(tokens, rel=1e-6) for r in records)
    assert records[0]["mfu"] == pytest.approx(tokens * 1e9 / 1e14, rel=1e-3)
    assert "memory_bytes" in records[1] and "memory_bytes" not in records[0]
    assert text.count("iteration ") == 2 and f"{tokens:,.0f} tokens/s" in text and "ETA 0:00:01" in text


def test_steps_that_are_done_again_are_told_once(tmp_path):
    run = run_of(tmp_path)
    tell(run, range(1, 5))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "lo')  # killed here
    tell(run, range(3, 5), start=2)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in records] == [1, 2, 3, 4]


def test_weights_and_biases_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_wandb(run_of(tmp_path))
    with pytest.raises(UserError, match=r"log\.wandb_project: needs wandb, .* pip install .*megatron-ssu\[wandb\]"):
        check_wandb(run_of(tmp_path, wandb_project="p"))


def test_tensorboard_missing_is_one_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    text = tell(run_of(tmp_path, tensorboard=True), range(1, 5))
    (line,) = [line for line in text.splitlines() if "warning" in line]
    assert "log.tensorboard" in line and "megatron-ssu[tensorboard]" in line
    assert not (tmp_path / "tensorboard").exists() and (tmp_path / "metrics.jsonl").exists()


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tell(run_of(tmp_path, wandb_project="p"), range(1, 5))
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"tokens_per_second" in written.read_bytes()


def test_weights_and_biases_without_a_login(tmp_path, monkeypatch):
    class Error(Exception):
        pass

    def login():
        raise Error("api_key not configured (no-tty)\ncall wandb.login")

    fake = types.ModuleType("wandb")
    fake.__spec__, fake.errors, fake.login = object(), types.SimpleNamespace(Error=Error), login
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(UserError, match=r"^log\.wandb_project: Weights & Biases is not logged in \(.*wandb login.*$"):
        check_wandb(run_of(tmp_path, wandb_project="p"))


def test_numbers_that_are_none_are_null(tmp_path):
    """metrics.jsonl is strict JSON, which has no NaN."""
    telemetry = Telemetry(run_of(tmp_path), Console(file=io.StringIO(), width=200), active=True)
    telemetry.step(1, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.1, "skipped": True})
    telemetry.close()

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    (record,) = [json.loads(x, parse_constant=refuse) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (record["loss"], record["grad_norm"], record["lr"], record["skipped"]) == (None, None, 0.1, True)


class Full:
    """A library's writer that fails with `fails` and counts what is asked of it."""

    def __init__(self, fails: str, asked: list[str]) -> None:
        self._fails, self._asked = fails, asked
        self._do("open")

    def _do(self, what: str) -> None:
        self._asked.append(what)
        if what == self._fails:
            raise OSError(28, "No space left on device")

    def add_scalar(self, *args) -> None:
        self._do("write")

    def log(self, *args, **kwargs) -> None:
        self._do("write")

    def flush(self) -> None:
        self._do("flush")

    def close(self) -> None:
        self._do("close")

    finish = close


class FullFile(Full):
    def write(self, text) -> None:
        self._do("write")


SINKS = {"metrics.jsonl": {}, "TensorBoard": {"tensorboard": True}, "Weights & Biases": {"wandb_project": "p"}}


FAILURES = [(sink, fails) for sink in SINKS for fails in ("open", "write", "close")] + [("metrics.jsonl", "flush")]


@pytest.mark.parametrize(("sink", "fails"), FAILURES)
def test_a_sink_that_fails_is_told_once_and_left_out(sink, fails, tmp_path, monkeypatch):
    asked: list[str] = []
    if sink == "metrics.jsonl":
        monkeypatch.setattr(Path, "open", lambda self, *args, **kwargs: FullFile(fails, asked))
    elif sink == "TensorBoard":
        monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", lambda *args, **kwargs: Full(fails, asked))
    else:
        fake = types.SimpleNamespace(init=lambda **kwargs: Full(fails, asked))
        monkeypatch.setitem(sys.modules, "wandb", fake)
    text = tell(run_of(tmp_path, **SINKS[sink]), range(1, 5))
    (warning,) = [line for line in text.splitlines() if line.startswith("warning")]
    assert sink in warning and "No space left on device" in warning
    assert text.count("iteration ") - warning.count("iteration ") == 2, "the console goes on"
    assert asked.count(fails) == 1
    if sink != "metrics.jsonl":  # the others have everything
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_event_and_metrics_files_on_a_full_device(tmp_path, monkeypatch):
    """The libraries' own errors: the event file is written by a thread of TensorBoard's."""
    from tensorboard.summary.writer import event_file_writer

    printed: list = []
    monkeypatch.setattr("threading.excepthook", printed.append)
    stock = event_file_writer.tf.io.gfile.GFile
    monkeypatch.setattr(event_file_writer.tf.io.gfile, "GFile", lambda name, mode: stock("/dev/full", mode))
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr("megatron_ssu.train.sinks._keep_records", lambda path, start: None)
    text = tell(run_of(tmp_path, tensorboard=True), range(1, 5))
    warnings = [line for line in text.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2 and all("No space left on device" in line for line in warnings), text
    assert not printed, "a thread's traceback"
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    assert [error.exc_type for error in printed] == [ZeroDivisionError], "other threads' errors are still shown"


ON_A_FULL_DISK = """
import sys
from megatron_ssu import cli
from megatron_ssu.errors import UserError

def work(options, console):
    console.print("one line")
    console.print("another")
    if sys.argv[1] == "refused":
        raise UserError("no")
    if sys.argv[1] == "lost":  # threads end the process so
        from megatron_ssu.train import watchdog
        watchdog._end("no")
    if sys.argv[1] == "taken":
        from megatron_ssu.train import run_lock
        run_lock._end("no")
    return 75

cli._call = work
cli.main(["train", "run.yaml"])
"""


@pytest.mark.process
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("how,status", [("stopped", 75), ("refused", 2), ("lost", 4), ("taken", 2)])
def test_output_that_nobody_can_read_changes_no_status(how, status):
    """Under SLURM it goes to files beside the run's own."""
    command = [sys.executable, "-c", ON_A_FULL_DISK, how]
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, stdout=full, stderr=full, timeout=120).returncode == status
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == status and "Traceback" not in done.stderr
    assert ("megatron-ssu: no" in done.stderr) == (how != "stopped"), done.stderr


@pytest.mark.process
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_command_that_only_prints_fails_where_it_cannot():
    """But not where its reader has seen enough; and without standard output and error it keeps its status."""
    code = ON_A_FULL_DISK.replace('"train"', '"estimate"')
    command = [sys.executable, "-c", code, "stopped"]
    work = [part.replace("return 75", "return 0") for part in command]
    with open("/dev/full", "w") as full:
        done = subprocess.run(work, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No space left on device" in done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        done = subprocess.run(work, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    script = f"exec {shlex.join(command)} >&- 2>&-"
    assert subprocess.run(["sh", "-c", script], timeout=120).returncode == 75


def test_closing_hides_no_other_error(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", lambda *args, **kwargs: Full("close", []))
    telemetry = Telemetry(run_of(tmp_path, tensorboard=True), Console(file=io.StringIO(), width=200), active=True)
    with pytest.raises(UserError, match="no room"):
        try:
            raise UserError("no room")
        finally:
            telemetry.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_log_on_a_full_disk_is_silent(tmp_path, capfd):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_00000.log").symlink_to("/dev/full")
    root = logging.getLogger()
    levels = {other: other.level for other in root.handlers}
    handler = log_to_file(tmp_path, 0, quiet=False)
    try:
        logging.getLogger("megatron_ssu").info("a line")
    finally:
        root.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()
        for other, level in levels.items():
            other.setLevel(level)
    assert capfd.readouterr().err == ""
