"""The CPU backend leaves what it does not need alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FACTORIES = """
import torch
from megatron_ssu.engine.cpu_backend import install_cpu_backend
install_cpu_backend()
with torch.device("meta"):
    print(all(make(3).is_meta for make in (torch.empty, torch.zeros, torch.ones, torch.arange, torch.rand, torch.randn)))
    print(torch.full((3,), 1).is_meta, torch.tensor([1]).is_meta, torch.zeros(3, device="cuda").is_cpu)
"""


@pytest.mark.process
def test_device_contexts_work_behind_the_cpu_backend():
    """transformers makes models in one: their rotary frequencies came out wrong otherwise."""
    done = subprocess.run([sys.executable, "-c", FACTORIES], capture_output=True, text=True, timeout=120)
    assert done.stdout == "True\nTrue True True\n", done.stderr[-2000:]


WITHOUT_A_GPU = """
import megatron_ssu.models.parallel_model  # imports megatron-core before ours
from megatron_ssu.engine.cpu_backend import install_cpu_backend
from megatron.core import optimizer
from megatron.core.extensions import transformer_engine
install_cpu_backend()
print(optimizer.USING_PYTORCH_OPTIMIZER, transformer_engine.HAVE_TE)
"""


TOO_LATE = """
import sys
from megatron_ssu.engine.cpu_backend import install_cpu_backend
sys.modules["transformer_engine"] = sys  # as if it had been imported before
install_cpu_backend()
"""


@pytest.mark.process
def test_kernels_that_need_cuda_are_not_taken_without_it(tmp_path):
    """megatron-core takes Transformer Engine's where that can be imported."""
    optimizers = tmp_path / "transformer_engine" / "pytorch" / "optimizers.py"
    optimizers.parent.mkdir(parents=True)
    names = "FusedAdam", "FusedSGD", "multi_tensor_applier", "multi_tensor_l2norm", "multi_tensor_scale"
    optimizers.write_text("".join(f"{name} = None\n" for name in names))
    metadata = tmp_path / "transformer_engine-2.20.2.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.20.2\n")
    for folder in (optimizers.parents[1], optimizers.parent):
        (folder / "__init__.py").write_text("")
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([str(tmp_path), root])}

    def python(code):
        command = [sys.executable, "-W", "ignore", "-c", code]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)

    done = python(WITHOUT_A_GPU)
    assert done.stdout == "True False\n", done.stderr[-2000:]
    late = python(TOO_LATE)
    assert late.returncode == 1 and "must be imported before Transformer Engine" in late.stderr, late.stderr
