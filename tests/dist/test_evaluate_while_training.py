"""The section `evaluate`: figures in the logs, a rule that ends the run, the best checkpoint; else training is as without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.models import make_model
from tests.unit.data_makers import TEXTS, make_hf_tokenizer, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_hf_tokenizer(make_model("olmo2", folder / "model", num_hidden_layers=2, vocab_size=321))
    write_jsonl(folder / "text.jsonl", TEXTS * 20)
    write_jsonl(folder / "other.jsonl", ["zq xv " * 12] * 8)
    chats = [[{"role": "user", "content": t}, {"role": "assistant", "content": t[:4]}] for t in TEXTS]
    lines = [json.dumps({"messages": chat}) for chat in chats]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def train(world: Path, out: Path, ranks: int = 2, *, evaluate: dict | None = None, status: int = 0, **changed) -> str:
    run = {
        "model": {"path": str(world / "model")},
        "parallel": {"tensor_model_parallel_size": ranks, "sequence_parallel": ranks > 1},
        "method": {"name": "none"},
        "data": {
            "train": str(world / "text.jsonl"), "sequence_length": 32,
            "target_valid": str(world / "text.jsonl"), "source_valid": str(world / "other.jsonl"),
        },
        "train": {"iterations": 6, "global_batch_size": 4, "eval_interval": 2, "eval_batches": 1, "optimizer": {"lr": 0.01}},
        "precision": {"dtype": "fp32"},
        "log": {"interval": 1},
        "checkpoint": {"directory": str(out), "interval": 0, "keep": 1},
    }  # fmt: skip
    for key, values in changed.items():
        run[key] = run[key] | values
    if evaluate is not None:
        run["evaluate"] = evaluate
    out.mkdir(exist_ok=True)
    (out / "given.yaml").write_text(yaml.safe_dump(run))
    start = (
        ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "29617"] if ranks > 1 else []
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *start, "-m", "megatron_ssu", "train", str(out / "given.yaml")],
        env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == status or (ranks > 1 and status and done.returncode), done.stderr
    return done.stdout + done.stderr


def records(out: Path) -> dict[int, dict]:
    found: dict[int, dict] = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["iteration"], {}).update(record)
    return found


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_figures_are_logged_and_training_is_as_without(ranks, world, tmp_path):
    files = {"texts": {"own": str(world / "text.jsonl")}, "chats": {"chat": str(world / "chats.jsonl")}}
    section = files | {"interval": 3, "limit": 4, "max_new_tokens": 4}
    said = train(world, tmp_path / "asked", ranks, evaluate=section)
    train(world, tmp_path / "quiet", ranks)
    asked, quiet = records(tmp_path / "asked"), records(tmp_path / "quiet")
    where = [i for i, record in sorted(asked.items()) if "evaluate/own/loss_per_byte" in record]
    assert where == [0, 3, 6]
    assert {f"evaluate/chat/{m}" for m in ("exact_match", "ended", "in_language", "repetition")} <= set(asked[3])
    assert asked[6]["evaluate/own/loss_per_byte"] < asked[0]["evaluate/own/loss_per_byte"]
    assert "evaluation     3 | own loss per byte" in said and "chat exact match" in said
    for i in range(1, 7):
        assert asked[i]["loss"] == quiet[i]["loss"] and asked[i]["grad_norm"] == quiet[i]["grad_norm"]


def test_a_rule_ends_the_run_and_the_best_checkpoint_stays(world, tmp_path):
    """The texts that are trained on get better, the others worse."""
    rule = {"figure": "source_valid_loss", "worse_by": 1}
    section = {"stop_when": rule, "best": {"figure": "target_valid_loss", "unless": rule}}
    out = tmp_path / "run"
    said = train(world, out, 1, evaluate=section, status=5, train={"iterations": 40})
    assert (
        "evaluate.stop_when: source_valid_loss is" in said and "stopped by evaluate.stop_when after iteration" in said
    )
    found = records(out)
    evaluated = sorted(i for i in found if "source_valid_loss" in found[i])
    last, start = evaluated[-1], found[0]["source_valid_loss"]
    assert found[last]["source_valid_loss"] > 1.01 * start
    assert all(found[i]["source_valid_loss"] <= 1.01 * start for i in evaluated[:-1])
    folder = out / "checkpoints"
    assert int((folder / "latest").read_text()) == last < 40
    kept = [i for i in evaluated[1:] if found[i]["source_valid_loss"] <= 1.01 * start]
    if kept:
        best = min(kept, key=lambda i: found[i]["target_valid_loss"])
        assert int((folder / "best").read_text()) == best
        assert sorted(p.name for p in folder.glob("iter_*")) == [f"iter_{i:07d}" for i in sorted({best, last})]
    said = train(
        world, out, 1, evaluate=section | {"stop_when": rule | {"worse_by": 1e6}}, train={"iterations": last + 2}
    )
    assert f"resuming after iteration {last}" in said and "was not measured" not in said
