"""What a run refuses to resume from, before anything is made or loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_ssu.config.schema import CheckpointSection, ModelSection, RunConfig
from megatron_ssu.errors import UserError
from megatron_ssu.methods.base import Method
from megatron_ssu.train import resume_check
from megatron_ssu.train.checkpoints import Checkpoints, Progress


@pytest.mark.parametrize("optimizer", [{}, {"optimizer": {"param_groups": []}}, {"optimizer": {"steps": 4}}])
def test_optimizer_state_of_an_earlier_version(
    optimizer: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunConfig(model=ModelSection(path="hf"), checkpoint=CheckpointSection(directory=str(tmp_path)))
    (tmp_path / "checkpoints" / "iter_0000004").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text("4\n")
    run.train.iterations = 8
    common = {"progress": vars(Progress(iteration=4)), "identity": {"method.name": "none"}, **optimizer}
    monkeypatch.setattr(Checkpoints, "read_common", lambda self, iteration: common)
    if "steps" in optimizer.get("optimizer", {}):
        assert resume_check.newest(run, Method(), Checkpoints(tmp_path)) == 4
        return
    reason = "it was written by an earlier version" if optimizer else "it holds weights alone"
    with pytest.raises(UserError, match=rf"iter_0000004: {reason}.*export"):
        resume_check.newest(run, Method(), Checkpoints(tmp_path))


def test_progress_without_what_was_read_is_of_an_earlier_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunConfig(model=ModelSection(path="hf"), checkpoint=CheckpointSection(directory=str(tmp_path)))
    (tmp_path / "checkpoints" / "iter_0000004").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text("4\n")
    run.train.iterations = 8
    progress = {key: value for key, value in vars(Progress(iteration=4)).items() if key != "blend"}
    common = {"progress": progress, "identity": {"method.name": "none"}, "optimizer": {"steps": 4}}
    monkeypatch.setattr(Checkpoints, "read_common", lambda self, iteration: common)
    with pytest.raises(UserError, match=r"iter_0000004: it was written by an earlier version and cannot be resumed"):
        resume_check.newest(run, Method(), Checkpoints(tmp_path))
