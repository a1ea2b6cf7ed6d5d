"""What a run tells, where: metrics.jsonl over restarts, console lines, Weights & Biases."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatron_ssu.config.schema import CheckpointSection, LogSection, ModelSection, RunConfig, TrainSection
from megatron_ssu.errors import UserError
from megatron_ssu.train.telemetry import Telemetry, check_installed


def run_of(folder: Path, **log) -> RunConfig:
    return RunConfig(
        model=ModelSection(path="model"),
        train=TrainSection(iterations=4, global_batch_size=2),
        checkpoint=CheckpointSection(directory=str(folder)),
        log=LogSection(interval=2, tensorboard=False, **log),
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
    check_installed(run_of(tmp_path))
    with pytest.raises(UserError, match=r"log\.wandb_project: the package wandb is not installed"):
        check_installed(run_of(tmp_path, wandb_project="p"))


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tell(run_of(tmp_path, wandb_project="p"), range(1, 5))
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"tokens_per_second" in written.read_bytes()
