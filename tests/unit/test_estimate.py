"""Estimates against what transformers counts, what is published, and arithmetic by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_ssu import cli
from megatron_ssu.compact.rules import is_pinned
from megatron_ssu.errors import UserError
from megatron_ssu.estimate.activations import in_flight
from megatron_ssu.estimate.compact import MatrixShield, compact
from megatron_ssu.estimate.estimate import estimate
from megatron_ssu.estimate.hardware import GPUS, gpu_named
from megatron_ssu.estimate.report import to_dict
from megatron_ssu.methods.registry import read_run
from megatron_ssu.models.families import family_of
from megatron_ssu.models.family import Dims
from megatron_ssu.shield.mask import Mask
from megatron_ssu.shield.shield_file import Shield
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
        return read_run(str(file), list(overrides))

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
    # Half of all columns are multiples of 16, also of those that 8 ranks share out: nothing is padded.
    assert stage.compact == 20 * layer // 8 and stage.trainable == stage.parameters - stage.compact
    assert stage.state.weights == 2 * (stage.parameters + stage.compact)
    assert stage.state.gradients == 4 * stage.trainable
    assert stage.state.optimizer == 12 * stage.trainable // 2  # two data-parallel ranks
    assert stage.state.gradient_copies == 0
    tokens = 64 * 2048
    gemms = 6 * (40 * layer + 100352 * 5120) * tokens / 16
    assert found.work.full == pytest.approx(gemms)
    assert found.work.full - found.work.gemms == pytest.approx(2 * 20 * layer * tokens / 16)
    split = (5120 + 13824) / 8  # inputs of o and down
    read, written = 2 * 5120 + split, (5 * 5120 + split) / 2  # q, k and v read theirs together, gate and up as well
    assert found.work.gather == 2 * (read + written) * 40 * tokens / 2
    assert found.traffic.data == stage.trainable * (4 + 2) / 2
    assert found.traffic.pipeline == 0
    # 16 bytes of gradient, 24 of main weight and moments, 2 of weight; then P is read, W read and written.
    updated = (16 + 24 + 2) * stage.trainable / 2
    assert found.optimizer_bytes == updated + 2 * (20 * layer + 2 * 40 * layer) / 8


def test_a_compact_13b_model_is_smaller_than_a_whole_one(run):
    for data, most in ((1, 0.645), (64, 0.85)):
        whole, shielded = (
            estimate(run(OLMO2_13B, f"method.name={method}"), OLMO2_13B, data, engine=True).stages[0].state.lasting
            for method in ("none", "ssu")
        )
        assert 0.5 < shielded / whole <= most, data


def test_host_memory_of_checkpoints_by_hand(run):
    layer, norms = 4 * 5120**2 + 3 * 5120 * 13824, 2 * 5120
    split = 40 * (layer + 2 * 5120) + 2 * 100352 * 5120  # q and k norms are split as well
    whole = split + 40 * norms + 5120
    found = estimate(run(OLMO2_13B, "parallel.tensor_model_parallel_size=2"), OLMO2_13B, 16, engine=True).host
    frozen = 20 * layer
    assert found.ranks == 8 and found.stored == 14 * whole - 12 * frozen and not found.background
    assert found.saving == found.stored / 2, "two nodes with four of eight data-parallel ranks each"
    replicated = 40 * norms + 5120  # every tensor-parallel rank loads them
    assert found.loading == 12 * (whole - frozen + replicated) / 2
    by_element = run(OLMO2_13B, "parallel.tensor_model_parallel_size=2", "shield.granularity=element")
    found = estimate(by_element, OLMO2_13B, 16, engine=True).host
    assert found.stored == 14 * whole and found.loading == 12 * (whole + replicated) / 2, "in its whole shape"
    pipeline = ["parallel.pipeline_model_parallel_size=2", "checkpoint.async_save=true"]
    found = estimate(run(OLMO2_13B, *pipeline), OLMO2_13B, 16, engine=True).host
    edge = 20 * (layer + 2 * 5120 + norms) + 100352 * 5120
    assert found.saving == 14 * (edge + 5120) - 12 * frozen / 2 and found.background, (
        "the last stage has a node of its own, and a norm more"
    )
    found = estimate(run(OLMO2_13B, *pipeline, "precision.dtype=fp32"), OLMO2_13B, 4, engine=True).host
    assert found.ranks == 4 and found.saving == found.stored == 16 * whole - 12 * frozen
    tied = {**OLMO2_13B, "tie_word_embeddings": True}
    found = estimate(run(tied, *pipeline, "method.name=none"), tied, 2, engine=True).host
    assert found.stored == 14 * (whole - 100352 * 5120) and found.loading == 12 * whole, "the tied head is loaded twice"


def test_whole_matrices_and_layers_are_counted_as_frozen(run):
    layer, norms = 4 * 5120**2 + 3 * 5120 * 13824, 4 * 5120
    for granularity, ratio, count, of_norms in (("matrix", 0.5, 20, 0), ("layer", 0.3, 12, norms)):
        overrides = [f"shield.granularity={granularity}", f"shield.ratio={ratio}"]
        found = estimate(run(OLMO2_13B, *overrides), OLMO2_13B, 1, engine=True)
        assert found.frozen == count * (layer + of_norms) and found.stages[0].compact == 0
        assert found.linear_ratio == count / 40 and found.stages[0].trainable == found.parameters - found.frozen
        stages = estimate(
            run(OLMO2_13B, "parallel.pipeline_model_parallel_size=4", *overrides), OLMO2_13B, 4, engine=True
        )
        trainable = [stage.trainable for stage in stages.stages[1:3]]
        assert trainable == [(10 - count / 4) * layer + 10 * norms - count / 4 * of_norms] * 2, "evenly over the stages"


def test_regularizers_by_hand(run):
    layer, embedding, tokens = 4 * 5120**2 + 3 * 5120 * 13824, 100352 * 5120, 64 * 2048
    plain, l2, kl = (
        estimate(run(OLMO2_13B, "method.name=none", *more), OLMO2_13B, 4, engine=True)
        for more in ([], ["train.regularize.l2=0.1"], ["train.regularize.kl=1"])
    )
    stage = plain.stages[0]
    assert stage.state.source == 0 and plain.work.source == 0
    assert l2.stages[0].state.source == stage.parameters, "fp32, on four data-parallel ranks"
    assert l2.optimizer_bytes - plain.optimizer_bytes == 16 * stage.parameters // 4
    assert l2.work == plain.work and l2.stages[0].activations == stage.activations
    assert kl.stages[0].state.source == 2 * stage.parameters
    assert kl.stages[0].activations - stage.activations == 2 * 2 * 2048 * 100352, "source's logits and a gradient, bf16"
    attention = 4 * 5120 * 2048 * 40 / 2
    assert kl.work.source == pytest.approx((2 * (40 * layer + embedding) + attention) * tokens / 4)
    assert kl.work.total == pytest.approx(plain.work.total + kl.work.source)
    stages = [
        estimate(run(OLMO2_13B, "parallel.pipeline_model_parallel_size=2", *more), OLMO2_13B, 4, engine=True)
        for more in ([], ["train.regularize.kl=1"])
    ]
    first, last = (b.activations - a.activations for a, b in zip(*(s.stages for s in stages), strict=True))
    assert first == 0 and last == 2 * (32 + 1) * 2048 * 100352, "all micro-batches of a step"
    assert stages[1].traffic.pipeline == 1.5 * stages[0].traffic.pipeline


def test_full_fine_tuning_freezes_nothing(run):
    found = estimate(run(OLMO2_13B, "method.name=none"), OLMO2_13B, 1, engine=True)
    assert found.frozen == 0 and found.work.full == found.work.gemms and found.work.gather == 0
    stage = found.stages[0]
    assert stage.compact == 0 and stage.trainable == stage.parameters
    assert stage.state.lasting == 18 * stage.parameters and stage.state.gradient_copies == 0
    assert found.optimizer_bytes == 42 * stage.parameters


def test_fp32_weights_are_their_own_main_weights(run):
    stage = estimate(run(OLMO2_13B, "precision.dtype=fp32"), OLMO2_13B, 1, engine=True).stages[0]
    assert stage.state.lasting == 4 * (stage.parameters + stage.compact) + (4 + 8) * stage.trainable


def test_gradients_are_copied_where_they_are_not_fp32_when_activations_are_gone(run):
    bf16 = "parallel.ddp.grad_reduce_in_fp32=false"
    stage = estimate(run(OLMO2_13B, bf16, "data.sequence_length=4096"), OLMO2_13B, 1, engine=True).stages[0]
    assert stage.activations > stage.state.gradient_copies == 4 * stage.trainable
    assert stage.peak == stage.state.lasting + stage.activations
    stage = estimate(run(OLMO2_13B, bf16, "data.sequence_length=256"), OLMO2_13B, 1, engine=True).stages[0]
    assert stage.activations < stage.state.gradient_copies
    assert stage.peak == stage.state.lasting + stage.state.gradient_copies
    assert stage.state.gradients == 2 * stage.trainable


@pytest.mark.parametrize(
    "overrides,saves",
    [
        (["shield.granularity=column"], True),
        (["shield.granularity=row"], True),
        (["shield.granularity=element"], False),
        (["precision.fp8=hybrid"], True),
        (["precision.fp8=hybrid", "precision.fp8_recipe=tensorwise"], True),
        (["precision.fp8=hybrid", "precision.fp8_recipe=blockwise"], True),
        (["precision.fp8=hybrid", "precision.fp8_recipe=mxfp8"], False),
    ],
)
def test_weight_gradients_of_columns_and_rows_cost_their_trainable_fraction(overrides, saves, run):
    found = estimate(run(OLMO2_13B, *overrides), OLMO2_13B, 1, engine=True)
    layers = 40 * (4 * 5120**2 + 3 * 5120 * 13824)
    assert found.work.full - found.work.gemms == pytest.approx(layers * 64 * 2048 if saves else 0)
    assert (found.work.gather > 0) == saves


@pytest.mark.parametrize("granularity,read", [("column", 2 * 5120 + 5120 + 13824), ("row", 5 * 5120 + 2 * 13824)])
def test_columns_of_a_fused_weight_read_their_input_once(granularity, read, run):
    """Rows are read from the output gradient, of which each matrix has its own part."""
    found = estimate(run(OLMO2_13B, f"shield.granularity={granularity}"), OLMO2_13B, 1, engine=True)
    written = {"column": 6 * 5120 + 13824, "row": 5 * 5120 + 2 * 13824}[granularity] / 2
    assert found.work.gather == 2 * (read + written) * 40 * 64 * 2048


def test_fp8_gathers_one_byte_and_reads_what_it_writes(run):
    found = estimate(run(OLMO2_13B, "precision.fp8=hybrid"), OLMO2_13B, 1, engine=True)
    assert found.work.gather == 40 * (6 * 5120 + 13824) * 64 * 2048


@pytest.mark.parametrize(
    "dimensions,frozen,pinned",
    [(2, 0, False), (2, 0.1, True), (2, 1 / 8, False), (2, 1, False), (1, 0, False), (1, 0.5, True), (1, 1, False)],
)
def test_what_is_pinned(dimensions, frozen, pinned):
    assert is_pinned(dimensions, frozen) == pinned


def test_compact_parameters_are_padded_on_every_rank():
    frozen = np.ones(64, dtype=bool)
    frozen[:17] = False  # 17 trainable columns or rows, all of them among the first half
    columns, rows = (MatrixShield(axis, 47 / 64, frozen) for axis in ("column", "row"))
    whole = compact(columns, (32, 64), None, 2, 64)
    assert whole.parameter == whole.gemm == 32 * 32 and whole.stored == 32 * 17
    assert (whole.read, whole.written) == (64, 32)
    outputs = compact(columns, (32, 64), 0, 2, 16)
    assert outputs.parameter == 16 * 32 and (outputs.read, outputs.written) == (64, 32)
    inputs = compact(columns, (32, 64), 1, 2, 32)
    assert inputs.parameter == 32 * 32, "one rank has 17 columns, the other none, and both room for 32"
    assert (inputs.read, inputs.written) == (32, 32)
    assert compact(rows, (64, 32), 0, 2, 32).parameter == 32 * 32
    assert compact(rows, (64, 32), 1, 2, 16).parameter == 32 * 16
    even = compact(MatrixShield("column", 0.5), (32, 64), 1, 4, 16)
    assert even.parameter == 32 * 16 and even.stored == 32 * 64 / 4 / 2, "8 columns on every rank"
    element = compact(MatrixShield("element", 47 / 64), (32, 64), 0, 2, 16)
    assert element.parameter == 32 * 17 // 2 and element.gemm == element.stored == 32 * 64 / 2
    every = compact(None, (30, 50), 0, 2, 15)
    assert every.parameter == every.gemm == every.stored == 15 * 50 and every.read == 0


def test_a_given_shield_decides_by_whole_parameters(run):
    hf = {**OLMO2_13B, "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 100}
    hf |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128}
    by_kind = {m.kind: m for m in family_of(hf).matrices(Dims.from_hf(hf)) if m.kind != "norm"}
    norm = next(m for m in family_of(hf).matrices(Dims.from_hf(hf)) if m.kind == "norm")

    def first(kind, granularity, count):
        """The first units frozen."""
        matrix = by_kind[kind]
        return matrix, Mask.of(
            granularity, matrix.shape, np.arange(Mask.constant(granularity, matrix.shape, False).units) < count
        )

    chosen = [
        first("embedding", "row", 3),  # 3 % : pinned
        first("q_proj", "column", 16),  # a quarter of a third: pinned
        first("o_proj", "row", 30),  # 34 rows train: compact, padded to 48
        first("gate_proj", "column", 64),  # nothing of it trains; up does as a whole: compact
        first("down_proj", "element", 64 * 96),  # frozen as a whole
        (norm, Mask.constant("element", norm.shape, True)),
    ]
    matrices, masks = {m.name: m for m, _ in chosen}, {m.name: mask for m, mask in chosen}
    shield = Shield("ssu", "model", "0", matrices=matrices, masks=masks)
    settings = run(hf, "data.sequence_length=64")
    found = estimate(settings, hf, 1, shield=shield, engine=False)
    stage = found.stages[0]
    compact_elements = 48 * 64 + 96 * 64
    assert stage.compact == compact_elements
    whole = stage.parameters - (64 * 64 + 2 * 96 * 64 + 64 * 96 + 64)  # o, gate and up, down, a norm
    assert stage.state.gradients == 4 * (whole + compact_elements)
    assert stage.state.weights == 2 * (stage.parameters + compact_elements)
    assert found.host.stored == 2 * stage.parameters + 12 * (whole + 34 * 64 + 96 * 64)
    tokens = 64 * 64
    saved = 16 * 64 + 96 * 64 + 64 * 96  # rows of o, gate, down
    assert found.work.full - found.work.gemms == pytest.approx(2 * saved * tokens)
    assert found.work.gather == 2 * (64 + 48) * tokens


def test_a_head_that_is_frozen_as_a_whole_has_no_weight_gradient(run):
    head = next(m for m in family_of(OLMO2_13B).matrices(Dims.from_hf(OLMO2_13B)) if m.kind == "head")
    masks = {head.name: Mask.constant("row", head.shape, True)}
    shield = Shield("ssu", "model", "0", matrices={head.name: head}, masks=masks)
    found = estimate(run(OLMO2_13B), OLMO2_13B, 1, shield=shield, engine=True)
    assert found.work.full - found.work.gemms == pytest.approx(2 * head.elements * 64 * 2048)
    assert found.stages[0].state.gradients == 4 * (found.stages[0].parameters - head.elements)


def test_stages_share_the_layers_and_hold_fewer_micro_batches_towards_the_end(run):
    four = estimate(run(OLMO2_13B, "parallel.pipeline_model_parallel_size=4"), OLMO2_13B, 4, engine=True)
    assert [stage.layers for stage in four.stages] == [10] * 4
    kept = [stage.activations for stage in four.stages[:3]]
    assert kept[0] / 4 == pytest.approx(kept[1] / 3) == pytest.approx(kept[2] / 2)
    assert four.fullest == 0
    assert [in_flight(s, 4, 1, 2) for s in range(4)] == [2, 2, 2, 1]
    assert [in_flight(s, 2, 2, 8) for s in range(2)] == [5, 3]


@pytest.mark.parametrize(
    "layers,ends,expected",
    [(64, 15, [15, 17, 17, 15]), (80, 19, [19, 21, 21, 19]), (62, None, [15, 16, 16, 15]), (64, 16, [16] * 4)],
)
def test_stages_of_uneven_pipelines(layers, ends, expected, run):
    hf = {**OLMO2_13B, "num_hidden_layers": layers}
    fields = [f"model.num_layers_in_{end}_pipeline_stage={ends}" for end in ("first", "last")]
    if ends is None:
        fields = [f"model.account_for_{what}_in_pipeline_split=true" for what in ("embedding", "loss")]
    found = estimate(run(hf, "parallel.pipeline_model_parallel_size=4", *fields), hf, 4, engine=True)
    assert [stage.layers for stage in found.stages] == expected
    layer, embedding = 4 * 5120**2 + 3 * 5120 * 13824 + 4 * 5120, 100352 * 5120
    by_hand = [count * layer for count in expected]
    by_hand[0] += embedding
    by_hand[-1] += embedding + 5120
    assert [stage.parameters for stage in found.stages] == by_hand
    peaks = [stage.peak for stage in found.stages]
    assert found.fullest == peaks.index(max(peaks)) and found.parameters == sum(by_hand)
    kept = [stage.activations / count for stage, count in zip(found.stages[:3], expected, strict=False)]
    assert kept[0] / 4 == pytest.approx(kept[1] / 3) == pytest.approx(kept[2] / 2), "micro-batches in flight"


def test_import_and_export_by_node(run):
    """Four nodes: portions of 64 MiB on their way to each GPU, six of 32 MiB with each rank that writes."""
    overrides = ["parallel.tensor_model_parallel_size=8", "checkpoint.max_shard_size=1GB"]
    host = estimate(run(OLMO2_13B, *overrides), OLMO2_13B, 32, engine=True).host
    assert host.importing == 8 * 2**26
    assert 28 <= host.files <= 31 and host.writers == host.files, "27.4 GB in files of 1 GB, none of which is full"
    assert host.exporting == 8 * 6 * 2**25
    few = estimate(run(OLMO2_13B, *overrides, "checkpoint.max_shard_size=10GB"), OLMO2_13B, 32, engine=True).host
    assert (few.files, few.writers, few.exporting) == (3, 3, 6 * 2**25), "on three nodes"


def test_recomputation_keeps_less(run):
    found = estimate(run(OLMO2_13B), OLMO2_13B, 1, engine=False).recompute
    assert found["full"] < found["selective"] < found["none"]


def test_time_falls_with_faster_gpus_and_with_frozen_columns(run):
    shielded = estimate(run(OLMO2_13B), OLMO2_13B, 1, engine=True)
    plain = estimate(run(OLMO2_13B, "method.name=none"), OLMO2_13B, 1, engine=True)
    seconds = [shielded.time(GPUS[name]).total for name in ("a100", "h100", "b200")]
    assert seconds == sorted(seconds, reverse=True)
    h100 = GPUS["h100"]
    assert 0.83 < shielded.time(h100).total / plain.time(h100).total < 0.9
    assert not to_dict(shielded, h100)["fits"]
    assert shielded.time(h100, 0.3).gemms == pytest.approx(2 * shielded.time(h100, 0.6).gemms)


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
    assert end.value.code == 0 and "4 (tensor) x 1 (pipeline) x 2 (data) = 8 ranks" in said and "per step" in said
    found = json.loads(target.read_text())
    assert found["parameters"] == 13_716_198_400 and found["fp8"] and found["seconds"]["step"] > 0
    stored = 14 * 13_716_198_400 - 12 * found["frozen"]
    assert found["host"]["ranks"] == 8 and found["host"]["stored"] == found["host"]["saving"] == stored
    assert "a checkpoint: 115.9 GB on disk; host memory on a node of 8 ranks, GiB: 107.9 while one is written, " in said
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, "--world-size", "0"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said == "megatron-ssu: --world-size: 0 must be 1 or more\n"
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, "--nonsense", "a=b"])
    assert end.value.code == 2 and "unrecognized arguments: --nonsense" in capsys.readouterr().err


def test_adapters_are_what_trains(run):
    overrides = ["method.name=lora", "method.lora.rank=16", "parallel.tensor_model_parallel_size=2"]
    found = estimate(run(OLMO2_13B, *overrides), OLMO2_13B, 2, engine=True)
    stage, hidden, ffn, rank = found.stages[0], 5120, 13824, 16
    assert found.added == 40 * rank * (4 * 2 * hidden + 3 * (hidden + ffn))
    column = 3 * (hidden + hidden // 2) + 2 * (hidden + ffn // 2)  # q, k, v, gate, up: A whole, B split by rows
    row = (hidden // 2 + hidden) + (ffn // 2 + hidden)  # o, down: A split by columns, B whole
    adapters = 40 * rank * (column + row)
    assert stage.state.optimizer == 12 * adapters and stage.state.gradients == 4 * adapters
    dora = estimate(run(OLMO2_13B, *overrides, "method.lora.dora=true"), OLMO2_13B, 2, engine=True).stages[0]
    assert dora.state.optimizer - stage.state.optimizer == 12 * 40 * (3 * hidden // 2 + 2 * ffn // 2 + 2 * hidden)
