"""The offline tools, each as a user starts it."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from megatron_ssu.errors import UserError
from megatron_ssu.train.run_lock import this_process
from tests.models import make_model

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_hf_to_core_and_back_gives_every_bit(tmp_path):
    model, core, back = make_model("olmo2", tmp_path / "model", torch.bfloat16), tmp_path / "core", tmp_path / "back"
    there = tool("checkpoint/convert.py", "--loader", "hf", "--load-dir", model, "--saver", "core", "--save-dir", core)
    assert there.returncode == 0, there.stderr
    again = tool("checkpoint/convert.py", "--loader", "core", "--load-dir", core, "--saver", "hf", "--save-dir", back)
    assert again.returncode == 0, again.stderr
    before, after = load_file(model / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_convert_writes_into_no_run_of_a_living_job(tmp_path):
    model, lock = make_model("olmo2", tmp_path / "model", torch.bfloat16), tmp_path / "core" / "run.lock.1"
    lock.parent.mkdir()
    lock.write_text(json.dumps(asdict(this_process("train"))))
    done = tool(
        "checkpoint/convert.py", "--loader", "hf", "--load-dir", model, "--saver", "core", "--save-dir", lock.parent
    )
    assert done.returncode == 2 and "held by `train`" in done.stderr and list(lock.parent.iterdir()) == [lock]


def test_a_conversion_that_is_refused_writes_nothing(tmp_path):
    """So the corrected command is not refused."""
    model, core = make_model("olmo2", tmp_path / "model"), tmp_path / "core"
    before = sorted(path.name for path in model.iterdir())
    command = ("checkpoint/convert.py", "--loader", "hf", "--load-dir", model, "--saver", "core", "--save-dir")
    for target, options, word in (
        (model, ("--dtype", "fp32"), "stays as it is"),
        (core, ("--dtype", "bf16"), "bf16"),
        (core, ("--dtype", "fp32", "parallel.tensor_model_paralel_size=2"), "tensor_model_parallel_size"),
    ):
        done = tool(*command, target, *options)
        assert done.returncode == 2 and word in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert sorted(path.name for path in model.iterdir()) == before and not core.exists()
    assert tool(*command, core, "--dtype", "fp32").returncode == 0
    done = tool(*command, core, "--dtype", "fp32")
    assert done.returncode == 2 and "not overwritten" in done.stderr


def test_convert_dtype_rounds_once_and_does_not_overwrite(tmp_path):
    model, target = make_model("llama", tmp_path / "model", max_shard_size="150KB"), tmp_path / "bf16"
    options = ("--source", model, "--target", target, "--dtype", "bf16")
    assert tool("convert_dtype.py", *options).returncode == 0
    before = {k: v for file in model.glob("*.safetensors") for k, v in load_file(file).items()}
    after = {k: v for file in target.glob("*.safetensors") for k, v in load_file(file).items()}
    assert all(torch.equal(before[k].bfloat16(), after[k]) for k in before) and before.keys() == after.keys()
    import transformers

    assert transformers.AutoModelForCausalLM.from_pretrained(target, dtype="auto").dtype == torch.bfloat16
    refused = tool("convert_dtype.py", *options)
    assert refused.returncode != 0 and "not overwritten" in refused.stderr


def test_convert_dtype_says_in_a_line_what_cannot_be_written(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("convert_dtype", ROOT / "tools" / "convert_dtype.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = make_model("llama", tmp_path / "model", num_hidden_layers=1)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path / "model")
    for target, word in (
        (tmp_path / "file" / "x", "it is a file"),
        (Path("."), "current directory"),
        (tmp_path, "exists"),
    ):
        with pytest.raises(UserError, match=word):
            module.convert(model, target, "bf16")

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = sorted(tmp_path.iterdir())
    for owner, name in ((safetensors.torch, "save_file"), (module, "carry_files")):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
            patch.setattr(owner, name, full)
            module.convert(model, tmp_path / "target", "bf16")
        assert sorted(tmp_path.iterdir()) == before
    (model / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        module.convert(model, tmp_path / "target", "bf16")
    assert sorted(tmp_path.iterdir()) == before
