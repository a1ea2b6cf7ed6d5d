"""What ranks do for test_large.py."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_ssu.models import hf_export
from megatron_ssu.models.hf_files import HFCheckpoint
from megatron_ssu.models.parallel_model import open_model
from tests.dist import work


def imported(model: str, parallel: dict[str, Any]) -> tuple[int, str]:
    """How many slices this rank read, and a digest of its weights."""
    stock, read = HFCheckpoint.get_slice, []

    def get_slice(self: HFCheckpoint, name: str) -> Any:
        read.append(name)
        return stock(self, name)

    with mock.patch.object(HFCheckpoint, "get_slice", get_slice):
        session = open_model(work.run_config(model, parallel))
    digest = hashlib.sha256()
    for local in session.layout:
        digest.update(local.param.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return len(read), digest.hexdigest()


def export_on_a_full_disk(model: str, parallel: dict[str, Any], target: str, rank: int) -> None:
    """Export in many files, of which one rank cannot write its second."""
    session = open_model(work.run_config(model, parallel))
    stock, opened = hf_export._Writer._open, []

    def full(self: Any, name: str, head: bytes) -> None:
        opened.append(name)
        if dist.get_rank() == rank and len(opened) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        stock(self, name, head)

    with mock.patch.object(hf_export._Writer, "_open", full):
        work.export(session, target, 40_000)


def exported_by(model: str, parallel: dict[str, Any], target: str) -> list[str]:
    """The files that this rank wrote."""
    session = open_model(work.run_config(model, parallel))
    stock, opened = hf_export._Writer._open, []

    def noted(self: Any, name: str, head: bytes) -> None:
        opened.append(name)
        stock(self, name, head)

    with mock.patch.object(hf_export._Writer, "_open", noted):
        work.export(session, target, 40_000)
    assert Path(target).is_dir()
    return opened
