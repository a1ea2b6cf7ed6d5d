"""What a container is built with, as far as it can be tried without building one."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIP = ["pip", "install"]


@pytest.fixture(scope="module")
def install():
    spec = importlib.util.spec_from_file_location("container_install", ROOT / "containers" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_installed_stays(install):
    import torch

    found = install.installed()
    assert found["torch"] == torch.__version__ and "numpy" in found
    lines = install.constraints(found).splitlines()
    assert f"torch=={torch.__version__}" in lines and all(re.fullmatch(r"[\w-]+==\S+", line) for line in lines)


@pytest.mark.parametrize(
    ("found", "python", "message"),
    [
        ({}, (3, 12), None),
        ({"torch": "2.11.0", "transformer-engine": "2.18.0"}, (3, 12), None),
        ({"torch": "2.11.0", "transformer-engine": "2.20.2+abc"}, (3, 10), None),
        ({"torch": "2.8.0a0", "transformer-engine": "2.4.0"}, (3, 12), "must be 2.18 or newer, got 2.4.0"),
        ({"transformer-engine": "2.20.2"}, (3, 12), "but no torch"),
        ({}, (3, 13), "Python must be 3.10 to 3.12, got 3.13"),
    ],
)
def test_images_that_do_not_fit_are_refused(install, found, python, message):
    got = install.refusal(found, python)
    assert (got is None) if message is None else (message in got)


def test_only_what_is_missing_is_installed(install):
    bare = [" ".join(c) for c in install.commands({}, PIP)]
    assert any(f"torch=={install.TORCH}" in c for c in bare)
    assert any(f"transformer-engine[pytorch]=={install.TRANSFORMER_ENGINE}" in c for c in bare)
    full = [" ".join(c) for c in install.commands({"torch": "1", "transformer-engine": "2.20"}, PIP)]
    assert not any("torch==" in c for c in full) and full[-1].endswith("-e .[test]")


def test_what_was_installed_constrains_what_follows(install, tmp_path, monkeypatch):
    """And an image without nvcc, whose kernels lack their CUDA part, ends the build."""
    ran, versions = [], [{"torch": "2.11.0"}, {"torch": "2.11.0", "transformer-engine": "2.20.2"}]
    kept = tmp_path / "kept.txt"

    def run(command, **options):
        ran.append((command, kept.read_text() if kept.exists() else ""))
        return subprocess.CompletedProcess(command, 0, install.constraints(versions[min(len(ran) // 3, 1)]), "")

    monkeypatch.setattr(install.subprocess, "run", run)
    monkeypatch.setattr(install, "Path", lambda place: kept if place == "/tmp/kept.txt" else tmp_path / place)
    (tmp_path / ".venv").mkdir()
    monkeypatch.setattr(install, "installed", lambda: {})
    install.main()
    pips = [(command, text) for command, text in ran if "pip" in command]
    assert len(pips) == 4 and "transformer-engine==2.20.2" in pips[-1][1]
    assert all(str(kept) in command for command, _ in pips)
    assert ran[-1][0][1:] == ["-c", install.CHECK] and "c.CUDA" in install.CHECK


def test_both_definitions_run_the_script_on_the_same_base():
    docker, apptainer = (ROOT / "Dockerfile").read_text(), (ROOT / "containers" / "megatron-ssu.def").read_text()
    for text in (docker, apptainer):
        assert "python3 containers/install.py" in text and "||" not in text
    base = re.search(r"^ARG BASE=(\S+)$", docker, re.MULTILINE)[1]
    assert f"BASE={base}\n" in apptainer
    packages = [re.search(r"--no-install-recommends (.*?)\s*(?:\\)?$", t, re.MULTILINE)[1] for t in (docker, apptainer)]
    assert packages[0] == packages[1]


def test_a_container_gets_no_environment_of_the_host():
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "build", "runs", "**/*.so"} <= set(ignored)


def folder_of(command: str, *arguments: str) -> str:
    """What train.sbatch takes for its own folder when SLURM shows `command`."""
    script = (ROOT / "examples" / "slurm" / "train.sbatch").read_text()
    function = re.search(r"^script_folder\(\).*?^}", script, re.MULTILINE | re.DOTALL)[0]
    shell = (
        f'again() {{ "$@"; }}\nscontrol() {{ echo \'   Command={command}\'; }}\njob=1\n{function}\nscript_folder "$@"'
    )
    done = subprocess.run(["bash", "-c", shell, "bash", *arguments], capture_output=True, text=True, check=True)
    return done.stdout.rstrip("\n")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_job_finds_its_neighbours_in_a_folder_with_spaces():
    assert folder_of("/home/me/slurm/train.sbatch run.yaml", "run.yaml") == "/home/me/slurm"
    spaced = "/home/me/my project/slurm"
    assert (
        folder_of(f"{spaced}/train.sbatch my run.yaml train.iterations=5", "my run.yaml", "train.iterations=5")
        == spaced
    )
    assert folder_of(f"{spaced}/train.sbatch", "run.yaml") == spaced


@pytest.mark.process
def test_setuptools_finds_nothing_deprecated():
    pytest.importorskip("setuptools", minversion="77")
    code = (
        "from setuptools import Distribution; from setuptools.config.pyprojecttoml import apply_configuration;"
        "apply_configuration(Distribution(), 'pyproject.toml')"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
