# ruff: noqa: E501 - the table of what is refused
"""Families without weights: what is refused and how, layers' windows and ropes, rows of fused tensors, shields of biases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_ssu.config.schema import CheckpointSection, DataSection, ModelSection, ParallelSection, RunConfig
from megatron_ssu.errors import UserError
from megatron_ssu.models.families import FAMILIES, family_of
from megatron_ssu.models.family import Dims, Scales
from megatron_ssu.models.limits import check_adapters, check_heads, check_limits
from megatron_ssu.models.rope import ropes
from megatron_ssu.models.source import open_source
from megatron_ssu.scoring.scores_file import Scores
from megatron_ssu.shield.plan import PlanOptions, plan_shield
from tests import models


def config_of(kind: str, **changes: Any) -> dict[str, Any]:
    """config.json of a small model, as transformers writes it."""
    import transformers

    model_type, extra = {**models.KINDS, **models.FAMILIES, **models.EXPERTS}[kind]
    config = transformers.AutoConfig.for_model(model_type, **{**models.SIZES, **extra})
    return {**json.loads(config.to_json_string(use_diff=False)), **changes}


REFUSED = [
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, ["rope_parameters", "'dynamic'", "yarn"]),
    ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}, ["rope_parameters", "one rope for all layers"]),
    ("olmo3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, ["rope_parameters", "full_attention, sliding_attention"]),
    ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}, ["rope_parameters.sliding_attention is missing"]),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "full_attention": {"rope_type": "default"}}}, ["rope_theta stands beside"]),
    ("llama", {"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "before it was quantised"]),
    ("llama", {"model_type": "mistral3"}, ["'mistral3'", "mistral"]),
    ("llama", {"attention_bias": True}, ["attention_bias = True", "False"]),
    ("qwen3", {"attention_bias": True}, ["attention_bias = True"]),
    ("llama", {"hidden_act": "gelu"}, ["hidden_act = 'gelu'", "'silu'"]),
    ("gemma2", {"hidden_activation": "gelu"}, ["hidden_activation = 'gelu'"]),
    ("gemma3", {"use_bidirectional_attention": True}, ["use_bidirectional_attention = True"]),
    ("smollm3", {"no_rope_layers": [1, 0]}, ["no_rope_layers must have 4 numbers, got 2"]),
    ("qwen3", {"layer_types": ["chunked_attention"] * 4}, ["layer_types", "'chunked_attention'"]),
    ("mistral", {"sliding_window": 0}, ["sliding_window must be a whole number above 0, got 0"]),
    ("mixtral", {"router_jitter_noise": 0.1}, ["router_jitter_noise = 0.1"]),
    ("mixtral", {"num_experts_per_tok": 1}, ["num_experts_per_tok = 1", "norm_topk_prob"]),
    ("olmoe", {"clip_qkv": 8.0}, ["clip_qkv = 8.0"]),
    ("qwen3-moe", {"num_experts_per_tok": 9}, ["num_experts_per_tok", "the 8 experts", "got 9"]),
    ("llama", {"num_hidden_layers": None}, ["num_hidden_layers", "whole number"]),
]  # fmt: skip


@pytest.mark.parametrize("kind,changes,words", REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_carried_out_is_refused_in_one_line(kind, changes, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of(kind, **changes)))
    with pytest.raises(UserError) as caught:
        open_source(tmp_path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and "config.json" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("kind", [*models.FAMILIES, *models.EXPERTS])
def test_every_family_is_found_and_its_matrices_are_those_of_transformers(kind, tmp_path):
    model = models.make_model(kind, tmp_path / "model")
    hf = json.loads((model / "config.json").read_text())
    family, dims = family_of(hf), Dims.from_hf(hf)
    tensors = {name: tuple(value.shape) for name, value in load_file(model / "model.safetensors").items()}
    rows: dict[str, int] = {}
    for matrix in family.matrices(dims):
        name, _, window = matrix.name.partition("[")
        assert name in tensors
        if window:
            first, stop = map(int, window.removesuffix("]").split(":"))
            assert first == rows.get(name, 0) and (stop - first, *tensors[name][1:]) == matrix.shape
            rows[name] = stop
        else:
            assert tensors[name] == matrix.shape
            rows[name] = matrix.shape[0]
    assert rows == {name: shape[0] for name, shape in tensors.items()}


def test_every_family_has_a_model_in_the_tests():
    kinds = {**models.KINDS, **models.FAMILIES, **models.EXPERTS}
    assert {model_type for model_type, _ in kinds.values()} == {t for family in FAMILIES for t in family.model_types}


def test_rows_of_a_fused_tensor_are_read_by_their_name(tmp_path):
    model = models.make_model("phi3", tmp_path / "model")
    source = open_source(model)
    whole = load_file(model / "model.safetensors")["model.layers.1.self_attn.qkv_proj.weight"]
    for kind, first, stop in (("q_proj", 0, 64), ("k_proj", 64, 96), ("v_proj", 96, 128)):
        name = next(m.name for m in source.family.matrices(source.dims) if m.layer == 1 and m.kind == kind)
        assert torch.equal(source.checkpoint.get(name), whole[first:stop])
        assert torch.equal(source.checkpoint.get_slice(name)[3:7, 2:5], whole[first + 3 : first + 7, 2:5])


def test_layers_attend_as_transformers_says():
    layers = Dims.from_hf(config_of("olmo3")).attention
    assert [layer.window for layer in layers] == [8, 8, 8, None] * 2
    assert [layer.rope for layer in layers] == (["sliding_attention"] * 3 + ["full_attention"]) * 2
    assert [layer.rope for layer in Dims.from_hf(config_of("smollm3")).attention] == ["full_attention", None] * 2
    assert [layer.window for layer in Dims.from_hf(config_of("qwen2-window")).attention] == [None, None, 8, 8]
    # A window that is written down beside `use_sliding_window: false` is none.
    unused = config_of("qwen2", sliding_window=8, use_sliding_window=False)
    assert {layer.window for layer in Dims.from_hf(unused).attention} == {None}


def test_keys_that_a_model_type_does_not_have_are_as_if_they_were_not_there():
    """transformers keeps them as attributes, which its models do not look at."""
    llama = config_of("llama", sliding_window=8, layer_types=["sliding_attention"] * 4, no_rope_layers=[0] * 4)
    assert Dims.from_hf(llama).attention == Dims.from_hf(config_of("llama")).attention
    mistral = config_of("mistral", layer_types=["full_attention"] * 4)
    assert [layer.window for layer in Dims.from_hf(mistral).attention] == [8] * 4


def test_a_yarn_of_full_layers_leaves_sliding_layers_alone():
    found = ropes(config_of("olmo3"), "model")
    assert found["sliding_attention"].factor == 1.0
    assert found["full_attention"].factor == pytest.approx(1.2079441541679836)
    assert not torch.equal(found["full_attention"].frequencies, found["sliding_attention"].frequencies)


def run_of(tensor: int = 1, context: int = 1, **data: Any) -> RunConfig:
    parallel = {"tensor_model_parallel_size": tensor, "context_parallel_size": context}
    return RunConfig(
        model=ModelSection(path="m"),
        checkpoint=CheckpointSection(directory="c"),
        parallel=ParallelSection(transformer=parallel),
        data=DataSection(**data),
    )


def test_limits_of_attention_name_their_key():
    hf = config_of("gemma2")
    family, dims = family_of(hf), Dims.from_hf(hf)
    scales = Scales(attention_cap=50.0)
    check_limits(run_of(), family, dims, scales, transformer_engine=True)
    with pytest.raises(UserError, match=r"context_parallel_size: 2 does not go with attn_logit_softcapping 50\.0"):
        check_limits(run_of(context=2), family, dims, scales, transformer_engine=True)
    packed = run_of(packing="documents", cross_document_attention=False)
    check_limits(packed, family, dims, scales, transformer_engine=False)
    with pytest.raises(UserError, match=r"data\.cross_document_attention: false"):
        check_limits(packed, family, dims, scales, transformer_engine=True)
    with pytest.raises(UserError, match=r"parallel\.cp_comm_type: must be a2a or all_gather .* got p2p"):
        check_limits(run_of(context=2), family, dims, Scales(), transformer_engine=True)
    exchanged = run_of(context=2)
    exchanged.parallel.transformer["cp_comm_type"] = "a2a"
    check_limits(exchanged, family, dims, Scales(), transformer_engine=True)


def test_heads_are_shared_by_multiples_of_ranks_alone():
    qwen, olmo = config_of("qwen3", num_key_value_heads=2), config_of("olmo3", num_key_value_heads=2)
    for tensor in (1, 2, 4, 8):
        check_heads(tensor, family_of(qwen), Dims.from_hf(qwen), "key")
    with pytest.raises(UserError, match="key: 16 ranks must divide the 8 attention heads"):
        check_heads(16, family_of(qwen), Dims.from_hf(qwen), "key")
    check_heads(2, family_of(olmo), Dims.from_hf(olmo), "key")
    with pytest.raises(UserError, match=r"key: must divide the 2 key/value heads of a olmo2, .* got 4"):
        check_heads(4, family_of(olmo), Dims.from_hf(olmo), "key")
    with pytest.raises(UserError, match=r"tensor_model_parallel_size: must be at most 2 .* with adapters, got 4"):
        check_adapters(run_of(4), family_of(qwen), Dims.from_hf(qwen))
    phi = config_of("phi3")
    with pytest.raises(UserError, match=r"method\.name: adapters are not supported on a phi3"):
        check_adapters(run_of(), family_of(phi), Dims.from_hf(phi))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> tuple[Scores, dict[str, torch.Tensor]]:
    """Scores of a random Qwen2 and its weights."""
    model: Path = models.make_model("qwen2", tmp_path_factory.mktemp("qwen") / "model")
    source, weights = open_source(model), load_file(model / "model.safetensors")
    matrices = {m.name: m for m in source.family.matrices(source.dims)}
    tensors = {
        f"magnitude/column/{m.name}": weights[m.name].double().abs().sum(0).numpy()
        for m in matrices.values()
        if m.scored
    }
    made = Scores(
        model="model", fingerprint="f", matrices=matrices, tensors=tensors, scores=["magnitude"], calibration="none",
        samples=0, tokens=0, settings={},
    )  # fmt: skip
    return made, weights


def test_biases_train_are_frozen_or_frozen_by_half(qwen):
    scores, weights = qwen
    biases = [name for name, m in scores.matrices.items() if m.kind == "bias"]
    assert len(biases) == 12
    shields = {
        choice: plan_shield(
            scores, PlanOptions(score="magnitude", biases=choice), method="ssu", weights=weights.__getitem__
        )
        for choice in ("trainable", "frozen", "half")
    }
    assert not any(name in shields["trainable"].masks for name in biases)
    assert all(shields["frozen"].masks[name].full().all() for name in biases)
    for name in biases:
        frozen = shields["half"].masks[name].full()
        values = weights[name].abs().numpy()
        assert frozen.sum() == len(values) // 2
        assert values[frozen].min() >= np.sort(values[~frozen])[-1]
    with pytest.raises(UserError, match=r"shield\.biases: half needs the biases' values"):
        plan_shield(scores, PlanOptions(score="magnitude", biases="half"), method="ssu")
