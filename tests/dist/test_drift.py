"""Drift of hidden states on meshes, against transformers and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from tests.dist import drift_work as work
from tests.dist.work import mesh
from tests.models import make_model

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
    first = make_model("olmo2", folder / "first")
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


def test_a_model_does_not_drift_from_itself(ranks, models):
    found = ranks.run(work.hidden, 1, [str(models[0])] * 2, mesh(), *rows())[0][0]
    for measures in found["layers"].values():
        assert measures["cosine"] == pytest.approx(1, abs=1e-9) and measures["cka"] == pytest.approx(1, abs=1e-9)
        assert measures["covariance"] == measures["mean"] == 0
    assert found["kl"] == pytest.approx(0, abs=1e-6) and found["loss"][0] == found["loss"][1]
