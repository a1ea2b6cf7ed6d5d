"""Small made-up models, scores and Hugging Face directories for tests of shields as files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from megatron_ssu.models.matrix import Matrix
from megatron_ssu.scoring.scores_file import Scores

CONFIG = {"model_type": "llama", "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "dtype": "bfloat16"}
HIDDEN, KV, FFN, VOCAB = 20, 12, 28, 36  # no multiples of 8 alone: spare bits occur


def matrices(
    layers: int = 2, hidden: int = HIDDEN, kv: int = KV, ffn: int = FFN, vocab: int = VOCAB
) -> dict[str, Matrix]:
    """All weights of a Llama-like model."""
    result = [
        Matrix("model.embed_tokens.weight", (vocab, hidden), None, "embedding"),
        Matrix("lm_head.weight", (vocab, hidden), None, "head"),
        Matrix("model.norm.weight", (hidden,), None, "norm"),
    ]
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    for layer in range(layers):
        for part, shape in shapes.items():
            result.append(Matrix(f"model.layers.{layer}.{part}.weight", shape, layer, part.split(".")[1]))
        result.append(Matrix(f"model.layers.{layer}.input_layernorm.weight", (hidden,), layer, "norm"))
    return {m.name: m for m in result}


def weights_of(members: dict[str, Matrix], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random bf16 weights."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(m.shape, generator=generator).to(torch.bfloat16) for n, m in sorted(members.items())}


def scores_of(members: dict[str, Matrix], weights: dict[str, torch.Tensor], seed: int = 0) -> Scores:
    """wanda, wanda-released, magnitude, sparsegpt-diagonal and fisher with their statistics, from made-up inputs."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for name, m in sorted(members.items()):
        if not m.scored:
            continue
        norm = np.exp(rng.normal(size=m.shape[1]))
        weight = weights[name].double().abs().numpy()
        mean_square = norm**2 / 64
        tensors[f"input_norm/column/{name}"] = norm
        tensors[f"input_mean_square/column/{name}"] = mean_square
        tensors[f"wanda/column/{name}"] = weight.sum(0) * norm
        tensors[f"wanda/row/{name}"] = weight @ norm
        tensors[f"wanda-released/column/{name}"] = np.sqrt((weight**2).sum(0)) * mean_square
        tensors[f"magnitude/column/{name}"] = weight.sum(0)
        tensors[f"magnitude/row/{name}"] = weight.sum(1)
        tensors[f"sparsegpt-diagonal/column/{name}"] = mean_square
        tensors[f"fisher/column/{name}"] = rng.exponential(size=m.shape[1])
        tensors[f"fisher/row/{name}"] = rng.exponential(size=m.shape[0])
    names = ["wanda", "wanda-released", "magnitude", "sparsegpt-diagonal", "fisher"]
    return Scores("tiny", "ab" * 32, members, tensors, names, calibration="c" * 64, samples=4, tokens=64)


def further_scores(scores: Scores, weights: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    """Add the other scores to those of `scores_of`: the released ones, change, snr, target-contrast."""
    rng = np.random.default_rng(9)
    for name, m in sorted(scores.matrices.items()):
        if not m.scored:
            continue
        weight, old = weights[name].double().numpy(), before[name].double().numpy()
        norm = np.exp(rng.normal(size=m.shape[1]))
        wanda = [np.abs(weight) * scores.column("input_norm", name), np.abs(weight) * norm]
        scores.tensors[f"target_input_norm/column/{name}"] = norm
        for axis, dim in (("column", 0), ("row", 1)):
            source, target = (values.sum(dim) / values.sum(dim).mean() for values in wanda)
            scores.tensors[f"target-contrast/{axis}/{name}"] = (source + 0.01) / (target + 0.01)
            scores.tensors[f"change/{axis}/{name}"] = np.linalg.norm(weight - old, axis=dim)
            scores.tensors[f"magnitude-released/{axis}/{name}"] = np.linalg.norm(weight, axis=dim)
        scores.tensors[f"sparsegpt-diagonal-released/column/{name}"] = scores.column("input_mean_square", name)
        scores.tensors[f"change/matrix/{name}"] = np.array([np.linalg.norm(weight - old) / np.linalg.norm(old)])
        scores.tensors[f"snr/matrix/{name}"] = rng.exponential(size=1)
    scores.scores += ["change", "magnitude-released", "snr", "sparsegpt-diagonal-released", "target-contrast"]
    scores.settings = {
        "change_from": {"model": "before", "fingerprint": "ef" * 32},
        "target_calibration": {"digest": "d" * 64, "samples": 2, "tokens": 32},
    }


def write_hf(directory: Path, weights: dict[str, torch.Tensor], shards: int = 1) -> Path:
    """A Hugging Face directory of safetensors in `shards` files, with a config.json."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    if shards == 1:
        save_file(weights, directory / "model.safetensors")
        return directory
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {n: weights[n] for n in sorted(weights)[number::shards]}
        save_file(part, directory / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
