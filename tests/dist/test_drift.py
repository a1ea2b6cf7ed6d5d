"""Drift of hidden states on meshes, against transformers and numpy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.dist import drift_work as work
from tests.dist.ranks import RankError
from tests.dist.work import mesh
from tests.models import make_model
from tests.unit.data_makers import TEMPLATE, TEXTS, make_hf_tokenizer

ROOT = Path(__file__).resolve().parents[2]

MESHES = {
    "TP1": (1, mesh()),
    "DP2": (2, mesh()),
    "TP2": (2, mesh(2)),
    "TP2+SP": (2, mesh(2, sequence=True)),
    "PP2": (2, mesh(1, 2)),
    "TP2+SPxPP2": (4, mesh(2, 2, sequence=True)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model, itself again, and a model that was moved a little."""
    folder = tmp_path_factory.mktemp("drift")
    first = make_model("olmo2", folder / "first", vocab_size=321)
    model = transformers.AutoModelForCausalLM.from_pretrained(first, attn_implementation="eager")
    torch.manual_seed(5)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.02 * torch.randn_like(param))
    model.save_pretrained(folder / "moved")
    return [first, folder / "moved"]


def rows():
    """5 rows of 32 tokens, the last with padding."""
    draw = torch.Generator().manual_seed(1)
    tokens, mask = torch.randint(0, 100, (5, 32), generator=draw), torch.ones(5, 32, dtype=torch.bool)
    mask[-1, 20:] = False
    return tokens, mask


def expected(models):
    """The same by transformers' outputs of its layers, and numpy in fp64."""
    tokens, mask = rows()
    states, logits = [], []
    for path in models:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
        kept = []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda m, a, out: kept.append(out[0] if isinstance(out, tuple) else out))  # noqa: B023
        with torch.no_grad():
            logits.append(model(tokens).logits.double())
        states.append([k[mask].double().numpy() for k in kept])
    layers = {}
    for number, (x, y) in enumerate(zip(*states, strict=True)):
        xc, yc = x - x.mean(0), y - y.mean(0)
        cxx, cyy, cyx = xc.T @ xc, yc.T @ yc, yc.T @ xc
        layers[str(number)] = {
            "cosine": np.mean((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)),
            "cka": np.linalg.norm(cyx) ** 2 / np.linalg.norm(cxx) / np.linalg.norm(cyy),
            "covariance": np.linalg.norm(cyy - cxx) / np.linalg.norm(cxx),
            "mean": np.linalg.norm(y.mean(0) - x.mean(0)) / np.linalg.norm(x.mean(0)),
        }
    predicts = mask[:, :-1] & mask[:, 1:]
    p, q = (value.log_softmax(-1)[:, :-1][predicts] for value in logits)
    labels = tokens[:, 1:][predicts]
    losses = [float(-value[torch.arange(len(labels)), labels].mean()) for value in (p, q)]
    return layers, float((p.exp() * (p - q)).sum(-1).mean()), losses, int(predicts.sum())


@pytest.mark.parametrize("place", MESHES)
def test_measures_equal_those_of_transformers(ranks, models, place):
    size, parallel = MESHES[place]
    found = ranks.run(work.hidden, size, [str(m) for m in models], parallel, *rows())[0][0]
    layers, kl, losses, tokens = expected(models)
    assert found["tokens"] == tokens and found["layers"].keys() == layers.keys()
    for layer, measures in layers.items():
        for key, value in measures.items():
            assert found["layers"][layer][key] == pytest.approx(value, abs=1e-5), (layer, key)
    assert found["kl"] == pytest.approx(kl, abs=1e-5) and found["loss"] == pytest.approx(losses, abs=1e-5)
    assert min(m["cka"] for m in layers.values()) < 0.99, "the models differ"


@pytest.mark.parametrize("place", ["TP1", "PP2", "TP2+SPxPP2"])
def test_predictions_that_are_not_finite_are_named_on_all_ranks(ranks, models, tmp_path, place):
    shutil.copytree(models[1], tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    size, parallel = MESHES[place]
    with pytest.raises(RankError, match="broken: its predictions are not finite") as caught:
        ranks.run(work.hidden, size, [str(models[0]), str(tmp_path / "broken")], parallel, *rows())
    assert caught.value.kind == "UserError"


def test_the_command_runs_under_torchrun(models, tmp_path):
    """The options of torchrun are also read by their beginnings, and must not be those of compare."""
    for path in models:
        make_hf_tokenizer(path, template=TEMPLATE)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {models[0]}}}\ncheckpoint: {{directory: {tmp_path}/out}}\nprecision: {{dtype: fp32}}\n"
        "parallel: {tensor_model_parallel_size: 2}\n"
        "data: {train: a.jsonl, packing: documents}\nreplay: {fraction: 0.1, path: [{path: b.jsonl, packing: none}]}\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    compare = ["-m", "megatron_ssu", "compare", *models, "--text", tmp_path / "text.jsonl", "--sequence-length", "32"]
    mesh_of = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = []
    for launcher, more in (([], []), (mesh_of, ["--run-file", tmp_path / "run.yaml"])):
        target = tmp_path / f"{len(found)}.json"
        command = [sys.executable, *launcher, *compare, *more, "--json", target]
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(target.read_text())["models"][0]["hidden"])
    one, two = found
    assert one["tokens"] == two["tokens"] and one["kl"] == pytest.approx(two["kl"], abs=1e-5)


def test_a_model_does_not_drift_from_itself(ranks, models):
    found = ranks.run(work.hidden, 1, [str(models[0])] * 2, mesh(), *rows())[0][0]
    for measures in found["layers"].values():
        assert measures["cosine"] == pytest.approx(1, abs=1e-9) and measures["cka"] == pytest.approx(1, abs=1e-9)
        assert measures["covariance"] == measures["mean"] == 0
    assert found["kl"] == pytest.approx(0, abs=1e-6) and found["loss"][0] == found["loss"][1]
