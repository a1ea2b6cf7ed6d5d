"""What examples/slurm/check_env.py finds, with processes in the place of nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).resolve().parents[2] / "examples" / "slurm" / "check_env.py"


def start(folder: Path, number: int, *options: str, nodes: int = 2) -> subprocess.Popen:
    command = [sys.executable, str(CHECK), "node", str(folder), "--nodes", str(nodes), "--ranks", "2", *options]
    environment = {
        **os.environ,
        "SLURM_NODEID": str(number),
        "SLURMD_NODENAME": f"node{number}",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def told(process: subprocess.Popen) -> tuple[int, list[str]]:
    _, errors = process.communicate(timeout=120)
    return process.returncode, [line for line in errors.splitlines() if line.startswith("check: ")]


@pytest.mark.process
def test_like_nodes_that_share_the_folder_pass(tmp_path):
    (tmp_path / "token").write_text("1-0\n")
    assert [told(process) for process in [start(tmp_path, n, "--cpu") for n in range(2)]] == [(0, [])] * 2


@pytest.mark.process
def test_other_versions_and_missing_gpus_are_named(tmp_path):
    (tmp_path / "token").write_text("1-0\n")
    facts = {"python": "3.9.0", "torch": "2.5.0"}
    (tmp_path / "node-1.json").write_text(json.dumps({"name": "node1", "facts": facts}))
    status, lines = told(start(tmp_path, 0, "--cpu"))
    assert status == 2
    assert any("node1: python 3.9.0, but " in line and "on node0; they must be the same" in line for line in lines)
    assert any("node1: torch 2.5.0" in line for line in lines) and any(
        "node1: megatron-core none" in line for line in lines
    )
    import torch

    if not torch.cuda.is_available():
        status, lines = told(start(tmp_path, 1))
        assert status == 2 and any("node1: 0 GPUs are usable and 2 are asked for" in line for line in lines)


@pytest.mark.process
def test_a_folder_that_is_not_shared_is_told_by_both_sides(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "token").write_text("1-0\n")
    wait = ("--cpu", "--wait", "1")
    first, second = start(tmp_path / "here", 0, *wait), start(tmp_path / "there", 1, *wait)
    status, lines = told(first)
    assert status == 2 and len(lines) == 1 and "node 1: has written no" in lines[0]
    status, lines = told(second)
    assert status == 2 and len(lines) == 1 and "token is not to be seen here" in lines[0]
