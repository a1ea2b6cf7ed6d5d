"""What can be known to be wrong before any weight is read is refused then, with what would do."""
# ruff: noqa: E501 - a case is a line

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ssu.commands.start import check_settings
from megatron_ssu.config.checks import machine
from megatron_ssu.config.checks.mesh import validate_mesh
from megatron_ssu.config.checks.model import validate_model
from megatron_ssu.config.checks.precision import validate_precision
from megatron_ssu.config.schema import RunConfig
from megatron_ssu.config.units import parse_size, parse_split
from megatron_ssu.errors import UserError
from megatron_ssu.methods.registry import method_of, read_run
from megatron_ssu.methods.shield_checks import validate_shield_files
from megatron_ssu.models.hf_config import read_hf_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 8,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": 100,
    "tie_word_embeddings": False,
}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and data in it, as the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(LLAMA))
    for name in ("a.jsonl", "b.jsonl.gz", "c.json.zst", "p.bin", "p.idx", "half.bin", "chat.jsonl", "notes.txt"):
        (tmp_path / name).touch()
    text = "model: {path: hf}\ncheckpoint: {directory: out}\ndata: {train: a.jsonl}\n"
    (tmp_path / "run.yaml").write_text(text + "shield: {calibration: {path: chat.jsonl}}\n")
    return tmp_path


TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
VPP = "parallel.virtual_pipeline_model_parallel_size"
BATCH = "train.global_batch_size"

GOOD: list[tuple[int, list[str], int]] = [
    (1, [], 1),
    (8, [f"{TP}=8"], 1),
    (8, [f"{TP}=2", f"{PP}=2", "parallel.sequence_parallel=true"], 2),
    (4, [f"{TP}=4"], 1),
    (2, [f"{PP}=2", f"{VPP}=2", "parallel.overlap_p2p_comm=true", "parallel.batch_p2p_comm=false"], 1),
    (2, [f"{PP}=2", "model.num_layers_in_first_pipeline_stage=3"], 1),
    (3, [f"{PP}=3", "model.num_layers_in_first_pipeline_stage=2", "model.num_layers_in_last_pipeline_stage=2"], 1),
    (2, [f"{PP}=2", f"{VPP}=2", "model.num_layers_in_first_pipeline_stage=2"], 1),
    (
        5,
        [
            f"{PP}=5",
            "model.account_for_embedding_in_pipeline_split=true",
            "model.account_for_loss_in_pipeline_split=true",
        ],
        1,
    ),
    (2, [f"{PP}=2", f"{VPP}=2", "parallel.microbatch_group_size_per_vp_stage=3", f"{BATCH}=5"], 1),
    (2, ["train.micro_batch_size=4", f"{BATCH}=8"], 2),
    (1, ["shield.calibration.path=", "shield.score=magnitude", "shield.also_score=[random]"], 1),
    (1, ["shield.calibration.path=", "shield.score=snr", "shield.granularity=matrix", "shield.freeze=lowest"], 1),
    (1, ["shield.score=target-contrast", "shield.target_calibration.path=a.jsonl", "shield.granularity=layer"], 1),
    (1, ["shield.calibration.path=", "method.name=none"], 1),
    (1, ["shield.calibration.path=[a.jsonl, chat.jsonl]"], 1),
    (1, ["data.train=[p, {path: b.jsonl.gz, weight: 3}]", "data.source_valid=c.json.zst", "data.target_valid=p"], 1),
    (1, ["data.sequence_length=512", "train.schedule.warmup_fraction=0", "shield.ratio=0"], 1),
    (1, ["model.recompute_granularity=full", "model.recompute_method=uniform", "model.recompute_num_layers=2"], 1),
    (1, ["model.recompute_granularity=selective", "model.recompute_modules=[core_attn, mlp]"], 1),
    (1, ["parallel.ddp.overlap_param_gather=true", "parallel.ddp.overlap_grad_reduce=true"], 1),
    (1, ["model.num_moe_experts=", "train.optimizer.optimizer=adam", "parallel.expert_tensor_parallel_size=1"], 1),
    (1, ["train.optimizer.decoupled_weight_decay=false"], 1),
    (1, ["checkpoint.max_shard_size=512MiB", "checkpoint.export=exported", "checkpoint.interval=0"], 1),
]


@pytest.mark.parametrize(("size", "overrides", "dp"), GOOD, ids=range(len(GOOD)))
def test_good_runs_pass(world: Path, size: int, overrides: list[str], dp: int) -> None:
    run = read_run("run.yaml", overrides)
    check_settings(run, method_of(run), read_hf_config("hf"), size)
    assert validate_mesh(run, size) == dp


# world size, overrides, changes to config.json, words of the message
BAD: list[tuple[int, list[str], dict[str, Any], list[str]]] = [
    # mesh
    (6, [f"{TP}=2", f"{PP}=2"], {}, ["parallel: 2 (tensor) x 2 (pipeline) x 1 (context) does not divide 6 (world size)", "multiple of 4"]),
    (1, [f"{TP}=2"], {}, ["does not divide 1 (world size)"]),
    (1, [f"{TP}=0"], {}, [TP, "0", "at least 1"]),
    (1, [f"{PP}=-1"], {}, [PP, "-1", "at least 1"]),
    (1, ["parallel.sequence_parallel=true"], {}, ["parallel.sequence_parallel", "tensor_model_parallel_size above 1"]),
    (1, [f"{VPP}=2"], {}, [VPP, "pipeline_model_parallel_size above 1"]),
    (2, [f"{PP}=2", f"{VPP}=0"], {}, [VPP, "at least 1"]),
    (2, [f"{PP}=2", f"{VPP}=2", "parallel.batch_p2p_comm=true", "parallel.overlap_p2p_comm=false"], {}, ["parallel.overlap_p2p_comm", "leave both out"]),
    (2, ["parallel.context_parallel_size=2"], {}, ["parallel.context_parallel_size", "Transformer Engine"]),
    (2, ["parallel.expert_model_parallel_size=2"], {}, ["parallel.expert_model_parallel_size", "without experts", "got 2"]),
    (2, ["parallel.expert_tensor_parallel_size=2"], {}, ["parallel.expert_tensor_parallel_size", "never split"]),
    (1, ["model.num_moe_experts=8"], {}, ["model.num_moe_experts", "8", "config.json decides it"]),
    (1, ["model.multi_latent_attention=true"], {}, ["model.multi_latent_attention", "config.json"]),
    (1, ["model.pipeline_model_parallel_layout=Et|tL"], {}, ["model.pipeline_model_parallel_layout", "cannot be checked"]),
    (1, ["parallel.ddp.use_megatron_fsdp=true"], {}, ["parallel.ddp.use_megatron_fsdp", "not supported"]),
    (1, ["train.optimizer.optimizer=sgd"], {}, ["train.optimizer.optimizer", "'sgd'", "adam"]),
    (1, ["train.optimizer.use_precision_aware_optimizer=true"], {}, ["use_precision_aware_optimizer", "needs CUDA"]),
    (1, ["train.optimizer.store_param_remainders=true"], {}, ["store_param_remainders", "whole main weights"]),
    (1, ["train.optimizer.overlap_param_gather_with_optimizer_step=true"], {}, ["overlap_param_gather_with_optimizer_step", "virtual pipeline"]),
    (1, ["train.regularize.l2=-0.1"], {}, ["train.regularize.l2", "at least 0", "got -0.1"]),
    (1, ["train.regularize.kl=-1"], {}, ["train.regularize.kl", "at least 0", "got -1"]),
    (1, ["train.regularize.kl_temperature=0"], {}, ["train.regularize.kl_temperature", "above 0", "got 0"]),
    (1, ["train.regularize.l1=0.1"], {}, ["train.regularize.l1", "l2"]),
    (1, ["parallel.gradient_accumulation_fusion=true", "method.name=none"], {}, ["parallel.gradient_accumulation_fusion", "needs CUDA"]),
    (1, ["model.attention_backend=flash"], {}, ["model.attention_backend", "flash", "Transformer Engine"]),
    (1, ["parallel.ddp.overlap_param_gather=true"], {}, ["parallel.ddp.overlap_param_gather", "overlap_grad_reduce"]),
    (1, ["parallel.timeout_minutes=0"], {}, ["parallel.timeout_minutes", "above 0"]),
    # precision
    (1, ["precision.fp8=hybrid"], {}, ["precision.fp8", "'hybrid'", "CUDA and Transformer Engine"]),
    (1, ["precision.fp4=e2m1"], {}, ["precision.fp4", "CUDA and Transformer Engine"]),
    # model
    (16, [f"{TP}=16"], {}, [TP, "16 does not divide 8 (num_attention_heads", "choose one of 1, 2, 4"]),
    (6, [f"{TP}=6"], {"num_attention_heads": 12, "hidden_size": 96}, [TP, "6 does not divide 4 (num_key_value_heads", "choose one of 1, 2, 4, 12"]),
    (4, [f"{TP}=4"], {"intermediate_size": 190}, [TP, "190 (intermediate_size", "choose one of 1, 2"]),
    (3, [f"{PP}=3"], {}, [PP, "8 layers", "3 (pipeline)", "could be 1 or 2 or 4 or 8"]),
    (16, [f"{PP}=16"], {}, [PP, "8 layers", "16 (pipeline)"]),
    (2, [f"{PP}=2", f"{VPP}=3"], {}, [PP, "8 layers", "2 (pipeline) x 3 (virtual)", "lower the virtual size"]),
    (2, [f"{PP}=2", "model.num_layers_in_first_pipeline_stage=8"], {}, ["8 layers - 8 (first stage)", "1 (other stages)"]),
    (1, ["model.num_layers_in_first_pipeline_stage=3"], {}, ["model.num_layers_in_first_pipeline_stage", "above 1"]),
    (2, [f"{PP}=2", "model.num_layers_in_last_pipeline_stage=0"], {}, ["num_layers_in_last_pipeline_stage", "at least 1"]),
    (2, [f"{PP}=2", f"{VPP}=2", "model.num_layers_in_first_pipeline_stage=2", "model.num_layers_in_last_pipeline_stage=6"], {}, ["model.num_layers_in_last_pipeline_stage", "leave it out", "gets the layers that are left"]),
    (2, [f"{PP}=2", "model.account_for_loss_in_pipeline_split=true"], {}, ["8 layers + 1 (loss)", "2 (pipeline)"]),
    (4, [f"{TP}=4", "model.make_vocab_size_divisible_by=6"], {}, ["model.make_vocab_size_divisible_by", "6", "12 would do"]),
    (1, ["model.make_vocab_size_divisible_by=0"], {}, ["model.make_vocab_size_divisible_by", "at least 1"]),
    (1, ["data.sequence_length=513"], {}, ["data.sequence_length", "513", "512 or less"]),
    (1, ["data.sequence_length=0"], {}, ["data.sequence_length", "at least 1"]),
    (4, [f"{TP}=4", "parallel.sequence_parallel=true", "data.sequence_length=30"], {}, ["data.sequence_length", "30", "4 (tensor)", "28 would do"]),
    (1, ["model.recompute_granularity=full"], {}, ["model.recompute_method", "uniform or block"]),
    (1, ["model.recompute_granularity=full", "model.recompute_method=block", "model.recompute_num_layers=9"], {}, ["model.recompute_num_layers", "9", "1 to 8"]),
    (1, ["model.recompute_granularity=selective", "model.recompute_modules=[mpl]"], {}, ["model.recompute_modules", "'mpl'", "core_attn, mlp"]),
    (1, ["model.recompute_granularity=selective", "model.recompute_modules=[layernorm]"], {}, ["model.recompute_modules", "Transformer Engine"]),
    (1, ["model.recompute_modules=[mlp]"], {}, ["model.recompute_granularity", "full or selective"]),
    (1, [], {"num_hidden_layers": None}, ["config.json", "num_hidden_layers", "whole number"]),
    (1, [], {"vocab_size": "100"}, ["config.json", "vocab_size", "'100'"]),
    (1, [], {"model_type": "mamba"}, ["hf/config.json", "mamba", "llama"]),
    (1, [], {"num_key_value_heads": 3}, ["config.json", "num_key_value_heads 3 does not divide"]),
    (1, ["method.name=none", "parallel.defer_embedding_wgrad_compute=true"], {}, ["megatron-core", "embedding wgrad"]),
    (1, ["parallel.defer_embedding_wgrad_compute=true"], {}, ["parallel.defer_embedding_wgrad_compute", "shielded head"]),
    # train
    (4, [f"{BATCH}=30", "train.micro_batch_size=2"], {}, [BATCH, "2 (micro batch) x 4 (data) = 8 does not divide 30", "24 or 32 would do"]),
    (4, [f"{BATCH}=2"], {}, [BATCH, "1 (micro batch) x 4 (data) = 4 does not divide 2", "4 would do"]),
    (2, [f"{PP}=2", f"{VPP}=2", f"{BATCH}=7"], {}, [BATCH, "7 micro-batches", "2 (pipeline)", "8 would do"]),
    (2, [f"{PP}=2", f"{VPP}=2", "parallel.microbatch_group_size_per_vp_stage=1"], {}, ["microbatch_group_size_per_vp_stage", "2 (pipeline)"]),
    (1, ["train.iterations=0"], {}, ["train.iterations", "0", "at least 1"]),
    (1, ["train.micro_batch_size=0"], {}, ["train.micro_batch_size", "at least 1"]),
    (1, ["train.eval_interval=-1"], {}, ["train.eval_interval", "at least 0"]),
    (1, ["train.seed=-1"], {}, ["train.seed", "-1", "from 0"]),
    (1, ["log.interval=0"], {}, ["log.interval", "at least 1"]),
    (1, ["train.schedule.warmup_fraction=1"], {}, ["train.schedule.warmup_fraction", "1.0", "[0, 1)"]),
    (1, ["train.schedule={decay_style: WSD, warmup_fraction: 0.5, wsd_decay_fraction: 0.6}"], {}, ["wsd_decay_fraction", "0.5 (warm-up) + 0.6 (decay)"]),
    (1, ["train.optimizer.min_lr=1"], {}, ["train.optimizer.min_lr", "1.0 is above lr 5e-05"]),
    (1, ["train.optimizer.lr="], {}, ["train.optimizer.lr", "missing"]),
    (1, ["train.optimizer.lr=-1"], {}, ["train.optimizer.lr", "at least 0"]),
    (1, ["train.optimizer.clip_grad=-0.1"], {}, ["train.optimizer.clip_grad", "at least 0"]),
    (1, ["train.optimizer.adam_beta1=1"], {}, ["train.optimizer.adam_beta1", "[0, 1)"]),
    (1, ["train.optimizer.exp_avg_dtype=bf16"], {}, ["train.optimizer", "exp_avg_dtype"]),
    # shield
    (1, ["shield.ratio=1.01"], {}, ["shield.ratio", "1.01", "from 0 to 1"]),
    (1, ["shield.kinds={mlp: -1}"], {}, ["shield.kinds.mlp", "-1.0", "from 0 to 1"]),
    (1, ["shield.ceiling=2"], {}, ["shield.ceiling", "2.0", "from 0 to 1"]),
    (1, ["shield.budget=layerwise", "shield.floor=0.6"], {}, ["shield.ratio", "0.5", "floor 0.6"]),
    (1, ["shield.score=wander"], {}, ["shield.score: 'wander'", "wanda", "fisher"]),
    (1, ["shield.also_score=[magnitud]"], {}, ["shield.also_score: 'magnitud'", "magnitude"]),
    (1, ["shield.granularity=colum"], {}, ["shield.granularity: 'colum'", "column, row, element"]),
    (1, ["shield.budget=kinds"], {}, ["shield.budget: 'kinds'", "uniform, layerwise, per-kind"]),
    (1, ["shield.kinds={mlp: 0.5}"], {}, ["shield.kinds", "per-kind, not uniform"]),
    (1, ["shield.budget=per-kind", "shield.kinds={mpl: 0.5}"], {}, ["shield.kinds.mpl", "attention, mlp", "down_proj"]),
    (1, ["shield.protect=[{pattern: '*.qkv.weight', action: frozen}]"], {}, ["'*.qkv.weight' fits no weight of the model"]),
    (1, ["shield.protect=[{pattern: 'layers:0-8', action: frozen}]"], {}, ["layers:0-8", "outside layers 0-7"]),
    (1, ["shield.score=magnitude", "shield.norms=half", "shield.calibration.path="], {}, ["calibration.path", "norms: half"]),
    (1, ["shield.seed=-1"], {}, ["shield.seed", "-1", "from 0"]),
    (1, ["shield.calibration.samples=0"], {}, ["shield.calibration.samples", "at least 1"]),
    (1, ["shield.calibration.path="], {}, ["shield.calibration.path", "'wanda'", "magnitude, magnitude-released, snr, random"]),
    (1, ["shield.score=target-contrast"], {}, ["shield.target_calibration.path: missing", "'target-contrast'", "target text"]),
    (1, ["shield.also_score=[target-contrast]", "shield.target_calibration.path=gone.jsonl"], {}, ["shield.target_calibration.path", "gone.jsonl"]),
    (1, ["shield.target_calibration.samples=0"], {}, ["shield.target_calibration.samples", "at least 1"]),
    (1, ["shield.score=change"], {}, ["shield.change_from: missing", "'change'", "Hugging Face directory"]),
    (1, ["shield.score=change", "shield.change_from=gone"], {}, ["shield.change_from: must be a directory", "'gone'"]),
    (1, ["shield.score=snr"], {}, ["shield.score: 'snr' has no column scores", "matrix, layer", "wanda"]),
    (1, ["shield.freeze=middle"], {}, ["shield.freeze", "highest", "lowest"]),
    (1, ["shield.granularity=layer", "shield.budget=layerwise"], {}, ["shield.budget: must be uniform", "granularity layer"]),
    (1, ["shield.calibration.path=", "shield.score=snr", "shield.granularity=matrix", "shield.norms=half-released"], {}, ["calibration.path", "norms: half-released"]),
    (1, ["shield.calibration.path=gone.jsonl"], {}, ["shield.calibration.path", "gone.jsonl", "does not exist"]),
    (1, ["shield.calibration.path=[chat.jsonl, notes.txt]"], {}, ["shield.calibration.path.1", "notes.txt", "JSONL"]),
    (1, ["shield.file=gone.safetensors"], {}, ["shield.file", "gone.safetensors", "does not exist"]),
    (1, ["shield.scores=hf"], {}, ["shield.scores", "is a directory"]),
    # data
    (1, ["data.train="], {}, ["data.train"]),
    (1, ["data.train=[]"], {}, ["data.train", "missing", "JSONL"]),
    (1, ["data.train=gone.jsonl"], {}, ["data.train", "gone.jsonl", "does not exist"]),
    (1, ["data.train=[a.jsonl, gone]"], {}, ["data.train.1", "'gone'", "gone.bin and gone.idx"]),
    (1, ["data.train=half"], {}, ["data.train", "half.idx is missing beside half.bin"]),
    (1, ["data.train=p.bin"], {}, ["data.train", "p.bin", "prefix: p"]),
    (1, ["data.train=~/a"], {}, ["data.train", "~", "not expanded"]),
    (1, ["data.train=[{path: p, weight: 0}]"], {}, ["data.train.0.weight", "above 0"]),
    (1, ["data.train=[{path: p, weight: {start: 1, end: 0}}]"], {}, ["data.train", "above 0 at the end of the run"]),
    (1, ["replay.fraction=0.1", "replay.path=[{path: p, weight: {start: 0, end: 1}}]"], {}, ["replay.path", "at the beginning"]),
    (1, ["data.train=[{path: a.jsonl, split: test}]"], {}, ["data.train.0", "left out for a file"]),
    (1, ["data.train=[{path: a.jsonl, subset: small}]"], {}, ["data.train.0", "left out for a file"]),
    (1, ["data.source_valid=gone.jsonl"], {}, ["data.source_valid", "does not exist"]),
    (1, ["data.target_valid=notes.txt"], {}, ["data.target_valid", "notes.txt"]),
    (1, ["data.split=99"], {}, ["data.split", "expected text"]),
    (1, ["data.split='99,-1,0'"], {}, ["data.split", "up to three numbers"]),
    (1, ["train.optimizer.min_lr="], {}, ["train.optimizer.min_lr", "got null", "write 0"]),
    (1, ["train.optimizer.decoupled_min_lr=1e-6"], {}, ["train.optimizer.decoupled_min_lr", "without decoupled_lr"]),
    (1, ["train.optimizer.min_lr=1e-5", "train.optimizer.decoupled_lr=1e-6"], {}, ["decoupled_lr: 1e-06 is below min_lr"]),
    (1, ["train.optimizer.log_num_zeros_in_grad=true"], {}, ["train.optimizer.log_num_zeros_in_grad", "not logged"]),
    (1, ["train.optimizer.loss_scale=128"], {}, ["train.optimizer.loss_scale", "fp16"]),
    (1, ["train.optimizer.hysteresis=3"], {}, ["train.optimizer.hysteresis", "fp16"]),
    (1, ["data.split='0,1,0'"], {}, ["data.split", "nothing to train on"]),
    (1, ["data.workers=0"], {}, ["data.workers", "at least 1"]),
    # methods
    (1, ["shield.calibration.path=", "method.name=lota", "method.lota.lr=0"], {}, ["method.lota.lr", "above 0, got 0"]),
    # checkpoint
    (1, ["checkpoint.max_shard_size=5XB"], {}, ["checkpoint.max_shard_size", "'5XB'", "5GB"]),
    (1, ["checkpoint.keep=0"], {}, ["checkpoint.keep", "at least 1"]),
    (1, ["checkpoint.interval=-5"], {}, ["checkpoint.interval", "at least 0"]),
    (1, ["checkpoint.directory=a.jsonl"], {}, ["checkpoint.directory", "a.jsonl is a file"]),
    (1, ["checkpoint.export=hf/../hf"], {}, ["checkpoint.export", "model.path"]),
]  # fmt: skip


@pytest.mark.parametrize(("size", "overrides", "changes", "words"), BAD, ids=range(len(BAD)))
def test_bad_runs_are_refused_in_one_line(
    world: Path, size: int, overrides: list[str], changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        run = read_run("run.yaml", overrides)
        check_settings(run, method_of(run), LLAMA | changes, size)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message


def test_the_equation_is_printed(world: Path) -> None:
    run = read_run("run.yaml", [f"{TP}=2", f"{PP}=2"])
    with pytest.raises(UserError) as caught:
        validate_mesh(run, 6)
    assert str(caught.value) == (
        "parallel: 2 (tensor) x 2 (pipeline) x 1 (context) does not divide 6 (world size); start a multiple of 4 ranks or "
        "choose sizes whose product divides 6"
    )


def test_scores_or_a_shield_made_before_need_no_calibration(world: Path) -> None:
    run = read_run("run.yaml", ["shield.calibration.path="])
    (world / "out").mkdir()
    (world / "out" / "scores.safetensors").touch()
    validate_shield_files(run)
    (world / "out" / "scores.safetensors").unlink()
    with pytest.raises(UserError, match=r"shield\.calibration\.path"):
        validate_shield_files(run)


def test_scoring_needs_no_training_data(world: Path) -> None:
    run = read_run("run.yaml", ["data.train=gone.jsonl", f"{BATCH}=3"])
    check_settings(run, method_of(run), LLAMA, 2, training=False)
    with pytest.raises(UserError):
        check_settings(run, method_of(run), LLAMA, 2)


def with_gpu(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setattr(machine, "cuda", lambda: True)
    monkeypatch.setattr(machine, "transformer_engine", lambda: True)
    return run


def test_what_a_gpu_allows(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["precision.fp8=hybrid", "parallel.context_parallel_size=2", "model.attention_backend=fused"]
    run = with_gpu(read_run("run.yaml", overrides), monkeypatch)
    assert validate_mesh(run, 4) == 2
    validate_precision(run)
    run = read_run("run.yaml", [*overrides, "data.sequence_length=34"])
    with pytest.raises(UserError, match=r"must be a multiple of 4 .* got 34"):
        validate_model(run, LLAMA)
    run = read_run("run.yaml", ["precision.fp8=hybrid", "data.sequence_length=24"])
    with pytest.raises(UserError, match=r"precision\.fp8: .* must be a multiple of 16"):
        validate_model(run, LLAMA)
    run = read_run("run.yaml", ["precision.fp8=hybrid", "precision.dtype=fp32"])
    with pytest.raises(UserError, match=r"precision\.fp8: 'hybrid' needs precision\.dtype: bf16"):
        validate_precision(run)
    run = read_run("run.yaml", ["parallel.ddp.fp8_param_gather=true"])
    with pytest.raises(UserError, match=r"parallel\.ddp\.fp8_param_gather: true does not go with method ssu"):
        validate_mesh(run, 1)
    assert (
        validate_mesh(
            read_run("run.yaml", ["parallel.ddp.fp8_param_gather=true", "method.name=none"]), 1, shields=False
        )
        == 1
    )
    assert validate_mesh(read_run("run.yaml", ["parallel.gradient_accumulation_fusion=true"]), 1) == 1


def test_parse_size() -> None:
    sizes = {"5GB": 5 * 10**9, "5 gb": 5 * 10**9, "1.5KB": 1500, "2KiB": 2048, "3MiB": 3 << 20, "1GiB": 1 << 30, "7": 7}
    assert {size: parse_size(size) for size in sizes} == sizes
    assert parse_size(12) == 12
    for size in ("", "GB", "5 GBs", "-5GB", "5e3", "1,5GB", "0", 0, -1, "0.1B", True):
        with pytest.raises(UserError, match=r"checkpoint\.max_shard_size"):
            parse_size(size)
    with pytest.raises(UserError, match="--max-shard-size"):
        parse_size("x", "--max-shard-size")


def test_parse_split() -> None:
    assert parse_split("98,1,1") == pytest.approx((0.98, 0.01, 0.01))
    assert parse_split(" 0.9, 0.1, 0") == pytest.approx((0.9, 0.1, 0.0))
    assert parse_split(" 3 , 1") == (0.75, 0.25, 0.0)
    for split in ("", "a", "1,2,3,4", "a,b,c", "nan,1,1", "inf,0,0", "-1,2,0", "0,1,1", "0,0,0", "1;2"):
        with pytest.raises(UserError, match=r"data\.split"):
            parse_split(split)


def test_documents_that_a_split_keeps_from_training_are_told(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    from megatron_ssu.commands.train import _warn_of_unused_documents

    for overrides, told in (([], 0), (["data.split='99,1,0'"], 1), (["data.split='1,0,0'"], 0)):
        caplog.clear()
        _warn_of_unused_documents(read_run("run.yaml", ["data.target_valid=a.jsonl", *overrides]))
        assert len(caplog.records) == told
        assert all("data.split: 99,1,0 keeps 1 % of the documents out" in record.message for record in caplog.records)
    _warn_of_unused_documents(read_run("run.yaml", ["data.split='99,1,0'"]))
    assert not [record for record in caplog.records if "out of training" in record.message]


def test_read_hf_config(world: Path) -> None:
    assert read_hf_config("hf") == LLAMA
    (world / "empty").mkdir()
    bad = {
        "list": b"[]",
        "broken": b'{"a": 1,\n "b"',
        "latin": '{"a": "é"}'.encode("latin-1"),
        "deep": b"[" * 100000,
    }
    for name, content in bad.items():
        (world / name).mkdir()
        (world / name / "config.json").write_bytes(content)
    expected = {
        "": "must be a directory",
        "org/name": r"or a hub id \(ORG/NAME\)",
        "~/hf": "~ is not expanded",
        "a.jsonl": "must be a directory",
        "empty": "config.json is missing",
        "list": "not a JSON object",
        "broken": "config.json:2: broken JSON",
        "latin": "not UTF-8",
        "deep": "cannot be read",
    }
    for path, words in expected.items():
        with pytest.raises(UserError, match=words) as caught:
            read_hf_config(path, "--model")
        assert str(caught.value).startswith("--model: ")
        assert len(str(caught.value).splitlines()) == 1
