"""The CPU backend leaves what it does not need alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

FACTORIES = """
import torch
from megatron_ssu import runtime
runtime.install_cpu_backend()
with torch.device("meta"):
    print(all(make(3).is_meta for make in (torch.empty, torch.zeros, torch.ones, torch.arange, torch.rand, torch.randn)))
    print(torch.full((3,), 1).is_meta, torch.tensor([1]).is_meta, torch.zeros(3, device="cuda").is_cpu)
"""


@pytest.mark.process
def test_device_contexts_work_behind_the_cpu_backend():
    """transformers makes models in one: their rotary frequencies came out wrong otherwise."""
    done = subprocess.run([sys.executable, "-c", FACTORIES], capture_output=True, text=True, timeout=120)
    assert done.stdout == "True\nTrue True True\n", done.stderr[-2000:]
