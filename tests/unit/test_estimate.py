"""Estimates against what transformers counts, what is published, and arithmetic by hand."""

from __future__ import annotations

import json

import pytest

from megatron_ssu import cli
from megatron_ssu.config.load import load_run
from megatron_ssu.errors import UserError
from megatron_ssu.estimate.activations import in_flight
from megatron_ssu.estimate.count import estimate
from megatron_ssu.estimate.gpus import GPUS, gpu_named
from megatron_ssu.estimate.report import to_dict
from tests.models import KINDS, SIZES, make_model

OLMO2_13B = {
    "model_type": "olmo2",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "vocab_size": 100352,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


@pytest.fixture
def run(tmp_path):
    def load(hf, *overrides):
        (tmp_path / "config.json").write_text(json.dumps(hf))
        file = tmp_path / "run.yaml"
        file.write_text(
            f"model: {{path: {tmp_path}}}\ncheckpoint: {{directory: {tmp_path / 'run'}}}\n"
            "data: {sequence_length: 2048}\ntrain: {micro_batch_size: 1, global_batch_size: 64}\n"
        )
        return load_run(str(file), list(overrides))

    return load


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_transformers(kind, run, tmp_path):
    import transformers

    path = make_model(kind, tmp_path / "model")
    hf = json.loads((path / "config.json").read_text())
    counted = transformers.AutoModelForCausalLM.from_pretrained(path).num_parameters()
    found = estimate(run(hf, "data.sequence_length=64"), hf, 1, engine=False)
    assert found.parameters == counted
    assert len(found.stages) == 1
    padding = (128 - SIZES["vocab_size"]) * SIZES["hidden_size"] * (1 if hf["tie_word_embeddings"] else 2)
    assert found.stages[0].parameters == counted + padding


def test_a_13b_model_by_hand(run):
    found = estimate(run(OLMO2_13B, "parallel.tensor_model_parallel_size=8"), OLMO2_13B, 16, engine=True)
    layer = 4 * 5120**2 + 3 * 5120 * 13824
    norms = 40 * 4 * 5120 + 5120
    assert found.parameters == 40 * layer + norms + 2 * 100352 * 5120 == 13_716_198_400
    assert found.frozen == 20 * layer and found.linear_ratio == 0.5
    stage = found.stages[0]
    split = (40 * layer + 40 * 2 * 5120 + 2 * 100352 * 5120) // 8  # q and k norms are split as well
    assert stage.parameters == split + 40 * 2 * 5120 + 5120
    assert stage.state.weights == 2 * stage.parameters and stage.state.gradients == 4 * stage.parameters
    assert stage.state.optimizer == 12 * stage.trainable // 2  # two data-parallel ranks
    tokens = 64 * 2048
    products = 6 * (40 * layer + 100352 * 5120) * tokens / 16
    assert found.work.full == pytest.approx(products)
    assert found.work.full - found.work.products == pytest.approx(2 * 20 * layer * tokens / 16)
    assert found.traffic.data == stage.parameters * (4 + 2) / 2
    assert found.traffic.pipeline == 0


def test_host_memory_of_checkpoints_by_hand(run):
    layer, norms = 4 * 5120**2 + 3 * 5120 * 13824, 2 * 5120
    split = 40 * (layer + 2 * 5120) + 2 * 100352 * 5120  # q and k norms are split as well
    whole = split + 40 * norms + 5120
    found = estimate(run(OLMO2_13B, "parallel.tensor_model_parallel_size=2"), OLMO2_13B, 16, engine=True).host
    assert found.ranks == 8 and found.stored == 14 * whole and not found.background
    assert found.saving == 14 * whole / 2, "two nodes with four of eight data-parallel ranks each"
    assert found.loading == 12 * 40 * layer / 2
    pipeline = ["parallel.pipeline_model_parallel_size=2", "checkpoint.async_save=true"]
    found = estimate(run(OLMO2_13B, *pipeline), OLMO2_13B, 16, engine=True).host
    edge = 20 * (layer + 2 * 5120 + norms) + 100352 * 5120
    assert found.saving == 14 * (edge + 5120) and found.background, (
        "the last stage has a node of its own, and a norm more"
    )
    found = estimate(run(OLMO2_13B, *pipeline, "precision.dtype=fp32"), OLMO2_13B, 4, engine=True).host
    assert found.ranks == 4 and found.saving == found.stored == 16 * whole
    tied = {**OLMO2_13B, "tie_word_embeddings": True}
    found = estimate(run(tied, *pipeline, "shield.method=none"), tied, 2, engine=True).host
    assert found.stored == 14 * (whole - 100352 * 5120) and found.loading == 0


def test_full_fine_tuning_freezes_nothing(run):
    found = estimate(run(OLMO2_13B, "shield.method=none"), OLMO2_13B, 1, engine=True)
    assert found.frozen == 0 and found.work.full == found.work.products
    assert found.stages[0].state.gradient_copies == 0


def test_gradients_are_copied_when_activations_are_gone(run):
    stage = estimate(run(OLMO2_13B, "data.sequence_length=4096"), OLMO2_13B, 1, engine=True).stages[0]
    assert stage.activations > stage.state.gradient_copies > 0
    assert stage.peak == stage.state.lasting + stage.activations
    stage = estimate(run(OLMO2_13B, "data.sequence_length=256"), OLMO2_13B, 1, engine=True).stages[0]
    assert stage.activations < stage.state.gradient_copies
    assert stage.peak == stage.state.lasting + stage.state.gradient_copies


def test_element_and_fp8_shields_save_no_product(run):
    for override in ("shield.granularity=element", "precision.fp8=hybrid"):
        found = estimate(run(OLMO2_13B, override), OLMO2_13B, 1, engine=True)
        assert found.work.full == found.work.products


def test_stages_share_the_layers_and_hold_fewer_micro_batches_towards_the_end(run):
    four = estimate(run(OLMO2_13B, "parallel.pipeline_model_parallel_size=4"), OLMO2_13B, 4, engine=True)
    assert [stage.layers for stage in four.stages] == [10] * 4
    kept = [stage.activations for stage in four.stages[:3]]
    assert kept[0] / 4 == pytest.approx(kept[1] / 3) == pytest.approx(kept[2] / 2)
    assert four.fullest == 0
    assert [in_flight(s, 4, 1, 2) for s in range(4)] == [2, 2, 2, 1]
    assert [in_flight(s, 2, 2, 8) for s in range(2)] == [5, 3]


def test_recomputation_keeps_less(run):
    found = estimate(run(OLMO2_13B), OLMO2_13B, 1, engine=False).recompute
    assert found["full"] < found["selective"] < found["none"]


def test_time_falls_with_faster_gpus_and_with_frozen_columns(run):
    shielded = estimate(run(OLMO2_13B), OLMO2_13B, 1, engine=True)
    plain = estimate(run(OLMO2_13B, "shield.method=none"), OLMO2_13B, 1, engine=True)
    seconds = [shielded.time(GPUS[name]).total for name in ("a100", "h100", "b200")]
    assert seconds == sorted(seconds, reverse=True)
    h100 = GPUS["h100"]
    assert 0.83 < shielded.time(h100).total / plain.time(h100).total < 0.9
    assert not to_dict(shielded, h100)["fits"]
    assert shielded.time(h100, 0.3).products == pytest.approx(2 * shielded.time(h100, 0.6).products)


def test_bad_gpus_and_meshes_are_refused(run):
    with pytest.raises(UserError, match="'h9000' is not known; known are a100, h100"):
        gpu_named("h9000")
    with pytest.raises(UserError, match="does not divide 12"):
        estimate(run(OLMO2_13B, "parallel.tensor_model_parallel_size=8"), OLMO2_13B, 12, engine=True)
    with pytest.raises(UserError, match="context_parallel_size"):
        estimate(run(OLMO2_13B, "parallel.context_parallel_size=2"), OLMO2_13B, 2, engine=True)
    with pytest.raises(UserError, match="global_batch_size"):
        estimate(run(OLMO2_13B), OLMO2_13B, 48, engine=True)


def test_the_command_prints_and_writes(run, tmp_path, capsys):
    run(OLMO2_13B)
    target = tmp_path / "estimate.json"
    arguments = ["estimate", str(tmp_path / "run.yaml"), "--gpu", "h100", "--world-size", "8", "--json", str(target)]
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, "parallel.tensor_model_parallel_size=4", "precision.fp8=hybrid"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "4 (tensor) x 1 (pipeline) x 2 (data) = 8 ranks" in said and "a step" in said
    found = json.loads(target.read_text())
    assert found["parameters"] == 13_716_198_400 and found["fp8"] and found["seconds"]["step"] > 0
    assert found["host"]["ranks"] == 8 and found["host"]["stored"] == found["host"]["saving"] == 14 * 13_716_198_400
    assert "a checkpoint: 192.0 GB on disk; host memory on a node of 8 ranks, GiB: 178.8 while one is written, " in said
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, "--world-size", "0"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said == "megatron-ssu: --world-size: 0 must be 1 or more\n"
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, "--nonsense", "a=b"])
    assert end.value.code == 2 and "unrecognized arguments: --nonsense" in capsys.readouterr().err
