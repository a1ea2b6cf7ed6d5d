"""The whole path on real text and a trained tiny model, as a user runs it; skipped where the data is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ssu.shield.shield_file import load_shield
from tests.dist import work
from tests.dist.work import mesh

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
MODEL = DATA / "olmo2-tiny-source"

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason=f"the real test data is not in {DATA}")


def command(*arguments: str, ranks: int = 1) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, "-m", "megatron_ssu", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_train_verify_and_export_as_a_user(tmp_path):
    import transformers

    run_file, out, adapted = tmp_path / "run.yaml", tmp_path / "run", tmp_path / "adapted"
    run_file.write_text(f"""
model: {{path: {MODEL}}}
parallel: {{tensor_model_parallel_size: 2, sequence_parallel: true}}
shield: {{calibration: {{path: {DATA}/calibration.jsonl, samples: 32, sequence_length: 128}}}}
data:
  train: {DATA}/amh_train.jsonl
  source_valid: {DATA}/eng_valid.jsonl
  target_valid: {DATA}/amh_valid.jsonl
  sequence_length: 64
train: {{iterations: 8, global_batch_size: 8, micro_batch_size: 2, eval_interval: 4, eval_batches: 1}}
checkpoint: {{directory: {out}, export: {adapted}, interval: 4}}
""")
    options = ["train.optimizer.lr=1e-3", "train.optimizer.weight_decay=0.1", "log.interval=2"]
    done = command("train", str(run_file), *options, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "50.00% of its linear weights frozen" in done.stdout

    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {r["iteration"]: r["loss"] for r in records if "loss" in r}
    assert sorted(losses) == list(range(1, 9)) and losses[8] < losses[1]
    watched = {r["iteration"]: r for r in records if "target_valid_loss" in r}
    assert sorted(watched) == [0, 4, 8] and watched[8]["target_valid_loss"] < watched[0]["target_valid_loss"]

    checked = command(
        "verify", "--source", str(MODEL), "--adapted", str(adapted), "--shield", f"{out}/shield.safetensors"
    )
    assert checked.returncode == 0, checked.stdout[-3000:]
    again = tmp_path / "again"
    moved = command(
        "export",
        str(run_file),
        "parallel.tensor_model_parallel_size=1",
        "parallel.sequence_parallel=false",
        "--output",
        str(again),
    )
    assert moved.returncode == 0, moved.stderr[-3000:]
    assert (again / "model.safetensors").read_bytes() == (adapted / "model.safetensors").read_bytes()
    transformers.AutoModelForCausalLM.from_pretrained(adapted)
    transformers.AutoTokenizer.from_pretrained(adapted)
    finished = command("train", str(run_file), *options, ranks=2)
    assert finished.returncode == 0 and "nothing to do" in finished.stdout


def test_bf16_shields_of_two_meshes_overlap(ranks, tmp_path):
    shields = []
    for world, parallel in ((1, mesh()), (4, mesh(2, 2))):
        directory = tmp_path / str(world)
        options = {"samples": 64, "sequence_length": 256}
        ranks.run(
            work.plan, world, str(MODEL), parallel, str(directory), str(DATA / "calibration.jsonl"), "bf16", **options
        )
        shields.append(load_shield(directory / "shield.safetensors"))
    one, other = shields
    same = frozen = 0
    for name, mask in one.masks.items():
        if one.matrices[name].scored:
            a, b = mask.columns(), other.masks[name].columns()
            same, frozen = same + int(np.sum(a & b)), frozen + int(a.sum())
    print(f"bf16: {same} of {frozen} frozen columns alike on 1 rank and on TP2 x PP2 ({same / frozen:.2%})")
    assert same >= 0.995 * frozen
