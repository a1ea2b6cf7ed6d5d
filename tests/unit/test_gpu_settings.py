"""What a GPU changes in settings and layers, as far as it can be seen without one."""

from __future__ import annotations

import re
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ssu.compact.selection import Workspace
from megatron_ssu.compact.weight import CompactWeight
from megatron_ssu.config.checks import machine
from megatron_ssu.config.checks.mesh import validate_mesh
from megatron_ssu.config.checks.optimizer import validate_placement
from megatron_ssu.config.checks.precision import validate_precision
from megatron_ssu.config.schema import CheckpointSection, ModelSection, ParallelSection, PrecisionSection, RunConfig
from megatron_ssu.engine import linear
from megatron_ssu.errors import UserError
from megatron_ssu.methods.base import Method
from megatron_ssu.models import build
from megatron_ssu.models.families import family_of
from megatron_ssu.models.family import Dims
from megatron_ssu.scoring import calibration_pass as calibrate
from megatron_ssu.shield.shield_file import Shield
from megatron_ssu.train import identity
from megatron_ssu.train.backends import backends, library
from megatron_ssu.train.identity import identity_of
from megatron_ssu.train.times import Times
from megatron_ssu.train.trainer import ddp_fields
from megatron_ssu.train.watchdog import Watchdog
from tests.unit.test_validate import LLAMA

FUSED = ("bias_activation_fusion", "bias_dropout_fusion", "cross_entropy_loss_fusion")


def run_config(dtype: Any = "bf16", **transformer: Any) -> RunConfig:
    return RunConfig(
        model=ModelSection(path="hf", transformer=transformer),
        checkpoint=CheckpointSection(directory="out"),
        parallel=ParallelSection(transformer={"cross_entropy_loss_fusion": False} if transformer else {}),
        precision=PrecisionSection(dtype=dtype),
    )


def config_of(run: RunConfig) -> Any:
    return build.transformer_config(run, family_of(LLAMA), LLAMA, Dims.from_hf(LLAMA))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "has_cuda", lambda: True)


def test_fused_kernels_are_the_default_on_cuda_alone(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(getattr(config_of(run_config()), name) for name in FUSED)
    monkeypatch.setattr(build, "has_cuda", lambda: False)
    assert not any(getattr(config_of(run_config()), name) for name in FUSED)


def test_the_run_file_overrides_fused_kernels(cuda: None) -> None:
    config = config_of(run_config(bias_activation_fusion=False, bias_dropout_fusion=False))
    assert not any(getattr(config, name) for name in FUSED)


def test_fused_kernels_that_would_change_results_or_are_missing_are_not_taken() -> None:
    fp32 = build.fused_settings(run_config("fp32"), engine=False)
    assert not fp32["cross_entropy_loss_fusion"] and not fp32["apply_rope_fusion"]
    assert build.fused_settings(run_config(), engine=True)["apply_rope_fusion"]
    assert not build.fused_settings(run_config(use_te_activation_func=True), engine=True)["bias_activation_fusion"]


def test_a_run_may_be_resumed_with_other_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "read_hf_config", lambda path: LLAMA)
    shield = Shield("none", "m", "f", matrices={}, masks={})
    plain, changed = (
        run_config(),
        run_config(bias_activation_fusion=False, bias_dropout_fusion=True, apply_rope_fusion=False),
    )
    assert identity_of(plain, Method(), shield, []).facts == identity_of(changed, Method(), shield, []).facts


def test_gradients_are_averaged_by_nccl_alone() -> None:
    assert ddp_fields({}, average=True)["average_in_collective"]
    assert not ddp_fields({}, average=False)["average_in_collective"]
    assert not ddp_fields({"average_in_collective": False}, average=True)["average_in_collective"]


class EngineLinear(torch.nn.Linear):
    """Stands for Transformer Engine's linear layer."""

    fuse_wgrad_accumulation, sequence_parallel = False, False


def test_dense_engine_layers_alone_accumulate_in_the_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear.extension, "HAVE_TE", True)
    monkeypatch.setattr(linear.extension, "TELinear", EngineLinear)
    monkeypatch.setattr(linear.extension, "TELayerNormColumnParallelLinear", EngineLinear)
    model = torch.nn.Sequential(EngineLinear(2, 2), EngineLinear(2, 2), torch.nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)  # compact parameters train in its place, or nothing does
    assert linear.accumulate_in_gemm([model]) == 1
    assert [layer.fuse_wgrad_accumulation for layer in model[:2]] == [False, True]


def test_what_stands_for_a_gradient_takes_memory_once() -> None:
    params = [SimpleNamespace(param=torch.nn.Parameter(torch.ones(3, 5))) for _ in range(2)]
    compact = CompactWeight(torch.nn.Parameter(torch.ones(6, 5)), tuple(params), Workspace())  # type: ignore[arg-type]
    first, second = compact.placeholders()
    assert first is not second and first.data_ptr() == second.data_ptr() and first.shape == (3, 5)


@pytest.mark.parametrize("fails", [False, True])
def test_scores_are_computed_without_fp8(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config, seen = SimpleNamespace(fp8="hybrid", fp4=None), []

    def schedule(**_: Any) -> None:
        seen.append((config.fp8, config.fp4))
        if fails:
            raise RuntimeError("broken")

    monkeypatch.setattr(calibrate, "get_forward_backward_func", lambda: schedule)
    session: Any = SimpleNamespace(config=config, chunks=[torch.nn.Linear(1, 1)], mesh=SimpleNamespace(virtual=None))
    batch = calibrate.MicroBatch(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4), None)
    if fails:
        with pytest.raises(RuntimeError, match="broken"):
            calibrate.calibration_pass(session, [batch], None)
    else:
        calibrate.calibration_pass(session, [batch], None)
    assert seen == [(None, None)] and (config.fp8, config.fp4) == ("hybrid", None)


def test_a_model_in_fp8_is_not_built_without_transformer_engine(cuda: None) -> None:
    run, mesh = run_config(), SimpleNamespace(chunks=1)
    config = config_of(run)
    config.fp8 = "hybrid"
    with pytest.raises(UserError, match=r"^precision\.fp8: 'hybrid' needs CUDA and a Transformer Engine"):
        build.build_chunks(run, family_of(LLAMA), LLAMA, Dims.from_hf(LLAMA), config, mesh)  # type: ignore[arg-type]


def test_an_engine_that_megatron_cannot_import_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.extensions import transformer_engine

    monkeypatch.setattr(machine, "cuda", lambda: True)
    monkeypatch.setattr(transformer_engine, "HAVE_TE", False)
    run = run_config()
    run.precision.transformer["fp8"] = "hybrid"
    with pytest.raises(UserError, match=r"^precision\.fp8: 'hybrid' needs CUDA and Transformer Engine"):
        validate_precision(run)
    monkeypatch.setattr(transformer_engine, "HAVE_TE", True)
    validate_precision(run)


@pytest.mark.parametrize(
    "recipe,refused", [("delayed", False), (None, False), ("tensorwise", True), ("blockwise", True)]
)
def test_attention_in_fp8_needs_delayed_scaling(
    recipe: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scales are delayed ones under every recipe."""
    monkeypatch.setattr(machine, "transformer_engine", lambda: True)
    run = run_config()
    run.precision.transformer |= {"fp8": "hybrid", "fp8_dot_product_attention": True}
    run.precision.transformer |= {"fp8_recipe": recipe} if recipe else {}
    with pytest.raises(UserError, match=r"^precision\.fp8_dot_product") if refused else nullcontext():
        validate_precision(run)


def test_flash_attention_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer.enums import AttnBackend

    monkeypatch.setattr(machine, "cuda", lambda: True)
    monkeypatch.setattr(machine, "transformer_engine", lambda: True)
    run = run_config()
    run.model.transformer["attention_backend"] = AttnBackend.flash
    with pytest.raises(UserError, match=r"^model\.attention_backend: flash needs the flash-attn package"):
        validate_mesh(run, 1)
    run.model.transformer["attention_backend"] = AttnBackend.fused
    validate_mesh(run, 1)


@pytest.mark.parametrize(
    "section,name,value,words",
    [
        ("parallel", "tp_comm_overlap", True, "communication buffers"),
        ("precision", "fp8_wgrad", False, "would ignore it"),
        ("model", "cuda_graph_impl", "local", "does not go with method ssu"),
    ],
)
def test_settings_that_would_be_ignored_or_break_are_refused(
    section: str, name: str, value: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cuda", lambda: True)
    run = run_config()
    getattr(run, section).transformer[name] = value
    with pytest.raises(UserError, match=rf"^{section}\.{name}: .*{words}"):
        validate_mesh(run, 1)


@pytest.mark.parametrize(
    "dtype,values,words",
    [
        ("fp32", {"use_precision_aware_optimizer": True}, r"needs precision\.dtype: bf16, not fp32"),
        ("bf16", {}, r"needs train\.optimizer\.use_precision_aware_optimizer: true"),
        (
            "bf16",
            {"use_precision_aware_optimizer": True, "decoupled_weight_decay": False},
            "needs decoupled_weight_decay",
        ),
    ],
)
def test_an_optimizer_on_the_cpu_needs_what_megatron_core_needs_for_it(dtype: Any, values: Any, words: str) -> None:
    run = run_config(dtype)
    run.train.optimizer = {"optimizer_cpu_offload": True, **values}
    with pytest.raises(UserError, match=rf"^train\.optimizer\.optimizer_cpu_offload: {words}"):
        validate_placement(run)
    run.precision.dtype = "bf16"
    run.train.optimizer = {"optimizer_cpu_offload": True, "use_precision_aware_optimizer": True}
    validate_placement(run)


class StepClock:
    """Time that a test sets, and what of it has been reached."""

    def __init__(self) -> None:
        self.now, self.reached = 0.0, float("inf")

    def mark(self) -> float:
        return self.now

    def between(self, first: float, second: float) -> float | None:
        return second - first if second <= self.reached else None


def test_times_book_each_moment_once() -> None:
    clock = StepClock()
    times = Times(clock)
    with times("forward-backward"):
        clock.now = 1.0
        with times("data"):
            clock.now = 3.0
        clock.now = 7.0
        with times("data"):
            clock.now = 7.5
        clock.now = 8.0
    clock.now = 9.0  # in no part
    with times("optimizer"):
        clock.now = 10.0
    assert times.take() == {"forward-backward": 5.5, "data": 2.5, "optimizer": 1.0}
    assert times.take() == {}


def test_what_the_gpu_has_not_finished_counts_later() -> None:
    clock = StepClock()
    times = Times(clock)
    for name, end in (("forward-backward", 4.0), ("optimizer", 5.0)):
        with times(name):
            clock.now = end
    clock.reached = 4.0
    assert times.take() == {"forward-backward": 4.0}
    clock.reached = 5.0
    assert times.take() == {"optimizer": 1.0}


def test_a_rank_that_reads_a_number_of_all_ranks_is_said_to_wait() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        watchdog = Watchdog(60.0)
        assert not watchdog._where()[0]
        with pytest.raises(RuntimeError, match="broken"), watchdog.waits():
            assert watchdog._where()[0]
            raise RuntimeError("broken")
        assert not watchdog._where()[0]
    finally:
        dist.destroy_process_group()


def test_a_run_names_the_libraries_of_what_it_is_made_of() -> None:
    layer = torch.nn.Module()
    layer.linear_qkv, layer.core_attention = torch.nn.Linear(1, 1), torch.nn.Identity()
    adam = SimpleNamespace(is_stub_optimizer=False, optimizer=torch.optim.AdamW(layer.parameters()))
    line = backends([layer], SimpleNamespace(chained_optimizers=[adam]), "auto")
    assert re.fullmatch(
        r"linear layers: torch \S+; attention: torch \S+ \(auto\); Adam: torch \S+ \(AdamW\); shield kernels: .+", line
    )
    nothing = SimpleNamespace(chained_optimizers=[SimpleNamespace(is_stub_optimizer=True)])
    assert backends([torch.nn.Module()], nothing, "auto").startswith("linear layers: none on this rank; ")


def test_the_library_of_a_layer_is_that_of_its_bases() -> None:
    assert library(torch.nn.Linear(1, 1)).startswith("torch 2.")
    engine = type("Linear", (torch.nn.Linear,), {"__module__": "transformer_engine.pytorch.module.linear"})
    wrapped = type("Wrapped", (engine,), {"__module__": "megatron.core.extensions.transformer_engine"})
    assert library(wrapped(1, 1)).startswith("transformer-engine ")
