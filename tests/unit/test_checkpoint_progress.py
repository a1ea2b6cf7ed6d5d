"""A save on a slow disk: progress is marked as long as there is some, on the ranks that wait as well."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from megatron_ssu.engine import checkpoint_io
from megatron_ssu.train import checkpoints as checkpoint
from megatron_ssu.train.checksums import digest_files


class Script:
    """A writer thread that has come `steps[i]` further at the i-th look, and then ends."""

    def __init__(self, pending: Any, steps: list[int]) -> None:
        self.pending, self.steps, self.looks = pending, list(steps), 0

    def join(self, timeout: float) -> None:
        self.looks += 1
        if self.steps:
            self.pending.steps += self.steps.pop(0)

    def is_alive(self) -> bool:
        return bool(self.steps)


@pytest.fixture
def saving(tmp_path):
    def make(steps: list[int]) -> tuple[checkpoint.Checkpoints, Any, list[int]]:
        checkpoints, marks = checkpoint.Checkpoints(tmp_path), []
        pending = checkpoint._Pending(1, tmp_path, request=None)
        pending.thread = Script(pending, steps)
        checkpoints.mark = lambda: marks.append(pending.thread.looks)
        return checkpoints, pending, marks

    return make


def test_a_slow_writer_marks_progress(saving):
    checkpoints, pending, marks = saving([1] * 500)
    checkpoints._wait(pending)
    assert marks == list(range(1, 501)), "one mark a look: none of them is far from the one before"


def test_a_writer_that_hangs_marks_none(saving):
    checkpoints, pending, marks = saving([1, 1, *[0] * 400, 1])
    checkpoints._wait(pending)
    assert marks == [1, 2, 403]


def test_a_rank_that_has_written_marks_the_progress_of_the_others(saving, monkeypatch):
    checkpoints, pending, marks = saving([5])
    other = iter([(True, 1), (True, 2), (True, 2), (True, 2), (True, 3), (False, 3)])
    monkeypatch.setattr(checkpoint, "gathered", lambda mine: [mine, next(other)])
    checkpoints._wait(pending)
    assert marks == [1, 2, 5] and next(other, None) is None


def test_what_is_written_goes_to_the_disk_in_portions(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_io, "PORTION", 100)
    file, synced, steps = tmp_path / "__0_0.distcp", [], []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    tensors = [
        (name, torch.zeros(size, dtype=torch.uint8))
        for name, size in zip("abcdef", (40, 40, 40, 250, 1, 1), strict=True)
    ]
    [(path, key, (objects, found))] = checkpoint_io.watched(
        [(str(file), "key", ([], tensors))], lambda: steps.append(1)
    )
    seen = []
    with open(path, "wb", buffering=0) as stream:
        for name, tensor in found:
            seen.append(name)
            stream.write(tensor.numpy().tobytes())
    assert (seen, key, objects) == (list("abcdef"), "key", [])
    assert synced == [120, 370] and len(steps) == 6


def test_digesting_steps_by_the_block(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * (9 << 20))
    steps: list[int] = []
    found = digest_files([tmp_path / "a"], lambda: steps.append(1))
    assert len(steps) == 3 and found == digest_files([tmp_path / "a"])
