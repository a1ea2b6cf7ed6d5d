"""One GPU: logits against transformers, frozen bits in bf16 and FP8, gradients and masks against the CPU's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.extensions import transformer_engine as engine

from megatron_ssu.engine.mesh import start_processes, stop_processes
from megatron_ssu.models.build import has_transformer_engine
from megatron_ssu.models.modules import SplitRMSNorm
from megatron_ssu.scoring.calibrate import MicroBatch, calibration_pass
from megatron_ssu.session import open_session
from megatron_ssu.shield import wgrad
from megatron_ssu.shield.file import load_shield
from megatron_ssu.shield.local import LocalShield
from megatron_ssu.shield.verify import verify
from tests.dist import empty_work, work
from tests.dist.test_shielded_training import random_shield
from tests.models import make_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
needs_engine = pytest.mark.skipif(
    not torch.cuda.is_available() or not has_transformer_engine(), reason="needs Transformer Engine"
)
# What tensor cores and Transformer Engine's kernels take: multiples of 16, heads of 64.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
FP8 = {
    "delayed": {"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 4, "fp8_amax_compute_algo": "max"},
    "tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
}


@pytest.fixture(autouse=True)
def alone():
    start_processes()
    yield
    stop_processes()
    if engine.HAVE_TE:
        engine.FP8GlobalStateManager.reset()  # it keeps the scales of layers that are gone


@pytest.fixture
def model(request, tmp_path):
    return make_model(getattr(request, "param", "olmo2"), tmp_path / "model", torch.bfloat16, **SIZES)


@pytest.mark.parametrize("model", ["olmo2", "llama", "llama-tied", "llama3"], indirect=True)
def test_logits_are_those_of_transformers(model):
    """As near to fp32 as transformers' own bf16 is."""
    import transformers

    ids = torch.randint(0, 100, (2, 64), generator=torch.Generator().manual_seed(0))

    def reference(dtype):
        net = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="eager")
        with torch.no_grad():
            return net(ids).logits.float().log_softmax(-1)

    exact, rounded = reference(torch.float32), reference(torch.bfloat16)
    found = work.logits(str(model), work.mesh(), ids, "bf16").float().cpu().log_softmax(-1)
    assert (found - exact).abs().mean() < 2 * (rounded - exact).abs().mean()


@pytest.mark.parametrize("precision", [None, *FP8], ids=str)
@pytest.mark.parametrize("granularity,share", [("column", 0.99), ("row", 0.99), ("element", 0.9)])
def test_no_frozen_bit_moves_and_the_rest_does(granularity, share, precision, model, tmp_path):
    if precision and not has_transformer_engine():
        pytest.skip("needs Transformer Engine")
    shield = random_shield(model, tmp_path / "shield.safetensors", granularity)
    options = {"dtype": "bf16", "shield_file": str(shield), "target": str(tmp_path / "adapted")}
    found = work.train_steps(str(model), work.mesh(), 20, precision=FP8.get(precision), **options)
    assert all(np.isfinite(loss) for loss, _, _ in found["history"])
    assert found["history"][-1][0] < found["history"][0][0] + 0.5
    assert found["state_bytes"] == pytest.approx(12 * (found["owned"] - found["frozen"]), rel=0.01)
    report = verify(model, tmp_path / "adapted", shield)
    assert report.ok
    totals = report.totals(granularity)
    assert totals["frozen"] > 0 and totals["moved_trainable"] > share * totals["trainable"]


@pytest.mark.parametrize("precision", [None, *FP8], ids=str)
def test_an_empty_shield_is_stock_megatron(precision, model):
    if precision and not has_transformer_engine():
        pytest.skip("needs Transformer Engine")
    options = {"dtype": "bf16", "precision": FP8.get(precision), "fused_adam": False}
    stock, ours = (work.train_steps(str(model), work.mesh(), 5, stock=stock, **options) for stock in (True, False))
    assert stock["history"] == ours["history"]
    assert all(torch.equal(a, b) for a, b in zip(stock["weights"], ours["weights"], strict=True))


def test_compact_gradients_follow_the_dense_path(model, tmp_path):
    shield = random_shield(model, tmp_path / "shield.safetensors")
    options = {"dtype": "bf16", "shield_file": str(shield)}
    dense, compact = (
        np.array(work.train_steps(str(model), work.mesh(), 10, gradient=gradient, **options)["history"])
        for gradient in ("dense", "compact")
    )
    assert np.allclose(dense[:, 0], compact[:, 0], rtol=5e-3)
    assert np.allclose(dense[:, 1], compact[:, 1], rtol=5e-2)


@needs_engine
def test_every_linear_layer_takes_part(model, tmp_path):
    session = open_session(work.run_config(str(model), work.mesh(), "bf16"))
    shield = LocalShield(load_shield(random_shield(model, tmp_path / "s.safetensors")), session.layout)
    assert wgrad.attach(session.chunks, shield) == 4 * session.source.dims.layers


def test_masks_on_the_gpu_are_those_on_the_cpu(model, tmp_path):
    shield = load_shield(random_shield(model, tmp_path / "s.safetensors"))
    session = open_session(work.run_config(str(model), work.mesh(), "bf16"))
    local = LocalShield(shield, session.layout)
    compared = 0
    for item in session.layout:
        mask = local.mask(item.param, 5, item.param.numel() - 3)
        if mask is None:
            continue
        values = torch.arange(mask.length, dtype=torch.float32)
        assert mask.device.type == "cuda"
        assert torch.equal(mask.compact(values.cuda()).cpu(), mask.to("cpu").compact(values))
        compared += 1
    assert compared > 10


def test_the_kernel_of_adam_can_be_chosen(model):
    histories = [
        work.train_steps(str(model), work.mesh(), 3, dtype="bf16", fused_adam=fused)["history"]
        for fused in (True, False)
    ]
    assert np.allclose(*map(np.array, histories), rtol=1e-2)


@pytest.mark.parametrize("precision", [None, *FP8], ids=str)
def test_wholly_frozen_matrices_and_layers_hold_nothing_else_up(precision, model, tmp_path):
    """Their compact tensors are empty, and one of them is the last of its group."""
    if precision and not has_transformer_engine():
        pytest.skip("needs Transformer Engine")
    path, target = tmp_path / "shield.safetensors", tmp_path / "adapted"
    empty_work.frozen_shield(str(model)).save(path)
    options = {"dtype": "bf16", "precision": FP8.get(precision), "shield_file": str(path), "target": str(target)}
    found = work.train_steps(str(model), work.mesh(), 20, **options)
    assert all(np.isfinite(loss) and 0 < norm < np.inf for loss, norm, _ in found["history"])
    report = verify(model, target, path)
    totals = report.totals("column")
    assert report.ok and totals["frozen"] > 0 and totals["moved_trainable"] > 0.99 * totals["trainable"]


def test_a_rank_with_nothing_but_frozen_weights_takes_part(model, tmp_path):
    path = tmp_path / "shield.safetensors"
    empty_work.frozen_shield(str(model), everything=True).save(path)
    found = work.train_steps(str(model), work.mesh(), 3, dtype="bf16", shield_file=str(path))
    assert [norm for _, norm, _ in found["history"]] == [0.0] * 3


@pytest.mark.parametrize("granularity", ["column", "row"])
def test_fused_settings_follow_the_unfused_ones(granularity, model, tmp_path):
    shield = random_shield(model, tmp_path / "shield.safetensors", granularity)
    unfused = dict.fromkeys(("bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion"), False)
    separate = dict.fromkeys(("cross_entropy_loss_fusion", "gradient_accumulation_fusion"), False)
    options = {"dtype": "bf16", "shield_file": str(shield)}
    fused, plain = (
        np.array(
            work.train_steps(str(model), {**work.mesh(), **parallel}, 10, transformer=model_, **options)["history"]
        )
        for parallel, model_ in (({}, {}), (separate, unfused))
    )
    assert np.allclose(fused[:, 0], plain[:, 0], rtol=5e-3)
    assert np.allclose(fused[:, 1], plain[:, 1], rtol=5e-2)


@needs_engine
def test_dense_layers_accumulate_in_the_gemm(model, tmp_path):
    session = open_session(work.run_config(str(model), work.mesh(), "bf16"))
    shield = LocalShield(load_shield(random_shield(model, tmp_path / "s.safetensors", "row")), session.layout)
    assert wgrad.attach(session.chunks, shield) == 0
    assert wgrad.accumulate_in_gemm(session.chunks) == 4 * session.source.dims.layers


@pytest.mark.parametrize("trainable", [1, 7, 8, 15, 16, 17, 63, 100, 128])
def test_compact_gradients_of_any_number_of_columns(trainable):
    draw = torch.Generator().manual_seed(trainable)
    columns = torch.randperm(128, generator=draw)[:trainable].sort().values
    outputs, x = (torch.randn(64, n, generator=draw).bfloat16() for n in (96, 128))
    found = torch.zeros(96, 128, device="cuda")
    wgrad.MatrixColumns(3, 32, 8, 16, columns.cuda()).add_gradient(found, outputs.cuda(), x.cuda())
    wanted = torch.zeros(96, 128)
    rows = torch.cat([torch.arange(first, first + 16) for first in (8, 40, 72)])
    dense = outputs.float().t() @ x.float()
    wanted[rows[:, None], columns] = dense[rows[:, None], columns]
    assert torch.allclose(found.cpu(), wanted, rtol=1e-2, atol=1e-2)
    assert torch.equal(found.cpu() != 0, wanted != 0)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1.6e-2)], ids=["fp32", "bf16"])
def test_the_split_norm_is_that_of_torch(dtype, tolerance):
    draw = torch.Generator("cuda").manual_seed(0)
    wide = torch.randn(64, 2, 4, 192, device="cuda", generator=draw).to(dtype)
    weight = (1 + 0.2 * torch.randn(4, 64, device="cuda", generator=draw)).to(dtype)
    grad = torch.randn(64, 2, 4, 64, device="cuda", generator=draw).to(dtype)
    results = []
    for split in (True, False):
        x, w = wide[..., :64].detach().requires_grad_(), weight.detach().requires_grad_()
        if split:
            y = SplitRMSNorm.apply(x, w, 256, 1e-6, dist.group.WORLD)
        else:
            y = torch.nn.functional.rms_norm(x.flatten(2), (256,), w.flatten(), 1e-6).view(x.shape)
        y.backward(grad)
        results.append((y.detach(), x.grad, w.grad))
    for found, wanted in zip(*results, strict=True):
        assert torch.allclose(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


@needs_engine
@pytest.mark.parametrize("recipe", FP8)
def test_calibration_in_an_fp8_run_computes_in_bf16(recipe, model):
    outputs = []
    for precision in ({}, FP8[recipe]):
        run = work.run_config(str(model), work.mesh(), "bf16")
        run.precision.transformer.update(precision)
        session = open_session(run)
        session.chunks[0].output_layer.register_forward_hook(lambda _, __, out: outputs.append(out[0].clone()))
        tokens = torch.randint(0, 100, (1, 32), generator=torch.Generator().manual_seed(0)).cuda()
        batch = MicroBatch(tokens, torch.arange(32, device="cuda").expand(1, -1), None)
        calibration_pass(session, [batch], None)
    assert torch.equal(*outputs)
