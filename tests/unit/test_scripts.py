"""Benchmarks and tools: asking for help loads neither torch nor megatron-core, and prints nothing but the help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("benchmarks/*.py"), *ROOT.glob("tools/**/*.py"))
    if path.name != "common.py"
)
HELP = """
import runpy, sys
sys.argv = [{script!r}, "--help"]
sys.path.insert(0, {folder!r})
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
loaded = [name for name in ("torch", "megatron", "transformers") if name in sys.modules]
assert not loaded, loaded
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_library(script: str) -> None:
    code = HELP.format(script=str(ROOT / script), folder=str((ROOT / script).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ") and not done.stderr
