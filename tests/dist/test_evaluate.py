"""Evaluation on meshes: log-likelihoods and greedy answers through lm-evaluation-harness equal to its own class for
transformers, and a run's checkpoint to its export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from megatron_ssu.evaluate.model import Row
from tests.dist import evaluate_work as work
from tests.dist.work import mesh
from tests.models import make_model
from tests.unit.data_makers import TEXTS, make_hf_tokenizer, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
MESHES = {
    "TP1": (1, mesh()),
    "TP2+SP": (2, mesh(2, sequence=True)),
    "DP2": (2, mesh()),
    "PP2": (2, mesh(1, 2)),
    "TP2xPP2": (4, mesh(2, 2)),
}
REQUESTS = {
    "loglikelihood": [(TEXTS[i % len(TEXTS)][:20], TEXTS[(i + 1) % len(TEXTS)][: 5 + i]) for i in range(7)]
    + [("", "abc")],
    "loglikelihood_rolling": [(text * 3,) for text in TEXTS[:5]],
    "generate_until": [(text[: 4 + i], {"until": ["e", "\n\n"], "max_gen_toks": 9}) for i, text in enumerate(TEXTS[:5])]
    + [("the", {"until": [], "max_gen_toks": 12}), ("a longer beginning", {"until": [], "max_gen_toks": 12})],
}


def draw_rows() -> list[Row]:
    draw = torch.Generator().manual_seed(4)
    return [Row(torch.randint(4, 300, (8 + 5 * i,), generator=draw).tolist(), 1 + 3 * i) for i in range(5)]


@pytest.fixture(scope="module", params=["olmo2", "gemma3", "qwen3-moe"])
def case(request, tmp_path_factory):
    """A model, and what the harness' own class and plain transformers make of the requests and rows."""
    path = make_model(request.param, tmp_path_factory.mktemp("evaluate") / "model", vocab_size=321)
    make_hf_tokenizer(path)
    theirs = HFLM(pretrained=str(path), dtype="float32", device="cpu", batch_size=1, max_length=128)
    expected = work.ask(theirs, REQUESTS)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    scores = []
    for row in draw_rows():
        with torch.no_grad():
            logits = model(torch.tensor([row.ids])).logits[0, :-1].double()
        own = torch.log_softmax(logits, -1)[torch.arange(len(row.ids) - 1), torch.tensor(row.ids[1:])]
        scores.append(float(own[-row.scored :].sum()))
    return request.param, path, expected, scores


@pytest.mark.parametrize("name", MESHES)
def test_the_harness_finds_the_same_on_every_mesh(ranks, case, name):
    kind, path, expected, scores = case
    world, parallel = MESHES[name]
    if kind == "qwen3-moe" and world > 1:
        parallel = parallel | {"sequence_parallel": "TP" in name, "expert_model_parallel_size": 1 + ("PP" not in name)}
    found, rows = ranks.run(work.on_mesh, world, str(path), parallel, REQUESTS, draw_rows())[0]
    for (a, greedy), (b, theirs) in zip(found["loglikelihood"], expected["loglikelihood"], strict=True):
        assert a == pytest.approx(b, abs=1e-4) and greedy == theirs
    assert found["loglikelihood_rolling"] == pytest.approx(expected["loglikelihood_rolling"], abs=2e-4)
    assert found["generate_until"] == expected["generate_until"]
    assert [row.logprob for row in rows] == pytest.approx(scores, abs=1e-4)
    assert len(set(found["generate_until"])) > 3  # they say something


def test_a_runs_checkpoint_is_evaluated_as_its_export(tmp_path):
    """Trained by `train`, under torchrun evaluated on another mesh; the export in plain transformers."""
    model = make_model("llama", tmp_path / "model", num_hidden_layers=2, vocab_size=321)
    make_hf_tokenizer(model)
    text = write_jsonl(tmp_path / "text.jsonl", TEXTS * 20)
    turns = [[{"role": "user", "content": t}, {"role": "assistant", "content": t[:4]}] for t in TEXTS]
    lines = [json.dumps({"messages": own, "task": "copy"}) for own in turns]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n")
    values = {
        "model.path": model, "method.name": "none", "data.train": text, "data.sequence_length": 32, "data.split": "80,20,0",
        "train.iterations": 4,
        "train.global_batch_size": 4, "train.optimizer.lr": 0.01, "precision.dtype": "fp32",
        "checkpoint.directory": tmp_path / "run", "checkpoint.export": tmp_path / "adapted",
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(f"model: {{path: {model}}}\ncheckpoint: {{directory: x}}\n")
    (tmp_path / "mesh.yaml").write_text(
        f"model: {{path: {model}}}\ncheckpoint: {{directory: x}}\nprecision: {{dtype: fp32}}\nmethod: {{name: none}}\n"
        "parallel: {tensor_model_parallel_size: 2, sequence_parallel: true}\n"
    )
    command(tmp_path, "-m", "megatron_ssu", "train", "run.yaml", *(f"{k}={v}" for k, v in values.items()))
    asked = [
        "--texts",
        "text=text.jsonl",
        "--chats",
        "chats.jsonl",
        "--limit",
        "6",
        "--max-new-tokens",
        "8",
        "--batch-size",
        "2",
    ]
    ranked = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29611", "-m", "megatron_ssu"]
    command(tmp_path, *ranked, "evaluate", "source=model", "run=run", "first=run@4", *asked, "--run-file", "mesh.yaml",
            "--output", "mesh.jsonl", "--answers", "answers")  # fmt: skip
    command(
        tmp_path, "-m", "megatron_ssu", "evaluate", "source=model", "run=adapted", *asked, "--output", "plain.jsonl"
    )
    on_mesh, plain = (read(tmp_path / f"{name}.jsonl") for name in ("mesh", "plain"))
    assert {model for model, *_ in on_mesh} == {"source", "run", "first"}
    assert {key for key in on_mesh if key[0] != "first"} == set(plain)
    for key, line in plain.items():
        assert on_mesh[key]["value"] == pytest.approx(line["value"], abs=1e-5), key
        assert (on_mesh[key]["forgetting"] is None) == (line["forgetting"] is None)
    assert on_mesh["run", "text", "loss_per_byte"]["value"] < on_mesh["source", "text", "loss_per_byte"]["value"]
    assert on_mesh["run", "text", "loss_per_byte"]["forgetting"]["percent"] < 0
    assert on_mesh["run", "text", "loss_per_byte"]["fingerprint"].startswith("checkpoint:")
    assert "2 (tensor)" in on_mesh["run", "text", "loss_per_byte"]["backend"]
    said = [json.loads(line) for line in (tmp_path / "answers" / "run-chats.jsonl").read_text().splitlines()]
    assert len(said) == 6 and {"messages", "reference", "task", "ended"} <= set(said[0])
    refused = command(
        tmp_path, *ranked, "evaluate", "model", "--texts", "none.jsonl", "--run-file", "mesh.yaml", check=False
    )
    assert "megatron-ssu: none.jsonl: " in refused


def command(folder: Path, *arguments: object, check: bool = True) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, timeout=400
    )
    assert not check or done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def read(path: Path) -> dict[tuple[str, str, str], dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {(line["model"], line["data"], line["metric"]): line for line in lines}
