"""Every mesh in examples/slurm/README.md is one that the recipes' models can be trained on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_ssu.commands.start import check_settings
from megatron_ssu.config.checks.mesh import validate_mesh
from megatron_ssu.estimate.estimate import estimate
from megatron_ssu.estimate.hardware import GPUS
from megatron_ssu.methods.registry import method_of, read_run

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "slurm"
README = (FOLDER / "README.md").read_text()
RECOMPUTE = re.findall(r"`(model\.recompute_[^`]*)`", README)

_COMMON = {"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False, "max_position_embeddings": 4096}
_OLMO2 = {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "rms_norm_eps": 1e-6, "rope_theta": 500000}
_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}


def shape(layers: int, hidden: int, heads: int, groups: int, middle: int, vocab: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": middle,
        "vocab_size": vocab,
    }


_QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-6, "rope_theta": 1e6}
_OLMO3 = {
    "model_type": "olmo3",
    "architectures": ["Olmo3ForCausalLM"],
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000,
    "sliding_window": 4096,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
}
_LLAMA3_ROPE = {
    "rope_theta": 500000,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e7,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
# As published in the models' config.json.
MODELS: dict[str, dict[str, Any]] = {
    "olmo2-7b": {**_COMMON, **_OLMO2, **shape(32, 4096, 32, 32, 11008, 100352)},
    "olmo2-13b": {**_COMMON, **_OLMO2, **shape(40, 5120, 40, 40, 13824, 100352)},
    "olmo2-32b": {**_COMMON, **_OLMO2, **shape(64, 5120, 40, 8, 27648, 100352)},
    "olmo3-32b": {**_COMMON, **_OLMO3, **shape(64, 5120, 40, 8, 27648, 100278)},
    "qwen2.5-32b": {**_COMMON, **_QWEN2, **shape(64, 5120, 40, 8, 27648, 152064)},
    "qwen2.5-72b": {**_COMMON, **_QWEN2, **shape(80, 8192, 64, 8, 29568, 152064)},
    "llama3.3-70b": {**_COMMON, **_LLAMA, **_LLAMA3_ROPE, **shape(80, 8192, 64, 8, 28672, 128256)},
    "qwen3-30b-a3b": {**_COMMON, **_QWEN3_MOE, **shape(48, 2048, 32, 4, 6144, 151936)},
    "llama2-13b": {**_COMMON, **_LLAMA, **shape(40, 5120, 40, 40, 13824, 32000)},
}


def rows() -> list[tuple[str, int, list[int], int, int, tuple[str, str, str], list[str]]]:
    """(recipe, nodes, mesh, micro batch, batch, (GB, s, host GB), overrides) of every row of the README's tables."""
    found, recipe = [], ""
    for line in README.splitlines():
        if heading := re.match(r"### .*`(\S+)\.yaml`", line):
            recipe = heading[1]
        if row := re.match(
            r"\| (\d+) \| ([\dx ]+) \| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) \| (\d+) \| (?:`(.*)` )?\|$", line
        ):
            mesh = [int(size) for size in row[2].split(" x ")]
            said = (row[5], row[6], row[7])
            found.append((recipe, int(row[1]), mesh, int(row[3]), int(row[4]), said, (row[8] or "").split()))
    return found


def gigabytes(hf: dict[str, Any], tensor: int, pipeline: int, data: int, ratio: float, expert: int) -> float:
    """bf16 weights with the trainable ones of the linear layers a second time, and fp32 gradients, main weights and two moments
    of what trains, of the average rank."""
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    head = hf.get("head_dim", hidden // heads)
    attention = 2 * hidden * head * (heads + hf["num_key_value_heads"])
    experts = hf.get("num_experts", 0) * 3 * hidden * hf.get("moe_intermediate_size", 0) * hf["num_hidden_layers"]
    linear = hf["num_hidden_layers"] * (attention + (0 if experts else 3 * hidden * hf["intermediate_size"]))
    both_ends = 2 * hf["vocab_size"] * hidden

    def bytes_of(weights: float, whole: float, replicas: float) -> float:
        compact = (1 - ratio) * weights
        return 2 * (weights + whole + compact) + (4 + 12 / replicas) * (compact + whole)

    dense = bytes_of(linear, both_ends, data) / (tensor * pipeline)
    return (dense + bytes_of(experts, 0, tensor * data / expert) / (expert * pipeline)) / 1e9


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the data that the recipes name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("source-chats", "target", "source-valid", "target-valid"):
        (tmp_path / "data" / f"{name}.jsonl").touch()
    return tmp_path


def test_every_recipe_has_its_meshes():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(MODELS)
    for recipe in MODELS:
        nodes = [row[1] for row in rows() if row[0] == recipe]
        assert nodes == ([2, 4, 16, 16] if recipe.endswith(("70b", "72b")) else [1, 2, 4, 16, 16])


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row[0]}-{row[1]}x8-batch{row[4]}")
def test_mesh_fits_its_model(world, row):
    recipe, nodes, (tensor, pipeline, virtual, data), micro, batch, said, overrides = row
    run = read_run(FOLDER / f"{recipe}.yaml", overrides)
    directory = world / run.model.path  # the hub's ids stand for directories here
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(MODELS[recipe]))
    check_settings(run, method_of(run), MODELS[recipe], 8 * nodes)
    assert validate_mesh(run, 8 * nodes) == data
    assert (run.parallel.tensor, run.parallel.pipeline, run.parallel.virtual_pipeline or 1) == (
        tensor,
        pipeline,
        virtual,
    )
    assert (run.train.micro_batch_size, run.train.global_batch_size) == (micro, batch)
    assert run.train.iterations * batch * run.data.sequence_length == pytest.approx(200e6, rel=1e-3)
    found = estimate(run, MODELS[recipe], 8 * nodes, engine=True)
    peak = found.stages[found.fullest].peak / 1e9
    assert said == (f"{peak:.0f}", f"{found.time(GPUS['h100']).total:.2f}", f"{found.host.saving / 1e9:.0f}")
    assert peak < 0.85 * 80
    state = sum(stage.state.lasting for stage in found.stages) / len(found.stages) / 1e9
    assert state == pytest.approx(
        gigabytes(MODELS[recipe], tensor, pipeline, data, run.shield.ratio, run.parallel.expert), rel=0.01
    )
    assert tensor <= 8, "tensor parallelism stays within a node"


@pytest.mark.parametrize("recipe,seconds", [("llama3.3-70b", "0.87"), ("qwen2.5-72b", "0.89")])
def test_uneven_stages_take_less_than_even_ones(recipe, seconds, world):
    _, nodes, _, _, _, said, overrides = [row for row in rows() if row[0] == recipe][-1]
    even = [override for override in overrides if "pipeline_stage" not in override]
    assert len(even) == len(overrides) - 2
    run = read_run(FOLDER / f"{recipe}.yaml", even)
    found = estimate(run, MODELS[recipe], 8 * nodes, engine=True)
    assert [stage.layers for stage in found.stages] == [20] * 4
    assert f"{found.time(GPUS['h100']).total:.2f}" == seconds > said[1]


def test_recompute_goes_with_every_recipe(world):
    assert len(RECOMPUTE) == 1
    for recipe, hf in MODELS.items():
        run = read_run(FOLDER / f"{recipe}.yaml", RECOMPUTE[0].split())
        nodes = next(row[1] for row in rows() if row[0] == recipe)
        check_settings(run, method_of(run), hf, 8 * nodes)
