"""One GPU: logits against transformers, frozen bits in bf16 and FP8, compact gradients against whole ones, memory."""

from __future__ import annotations

import gc
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.extensions import transformer_engine as engine

from megatron_ssu.compact.gemm import add_gemm
from megatron_ssu.compact.matrix import padded
from megatron_ssu.compact.parameters import CompactParameters
from megatron_ssu.compact.selection import Blocks, Picked
from megatron_ssu.compact.store import CompactStore
from megatron_ssu.compact.trial import tried_gemm
from megatron_ssu.config.schema import DataSection, TrainSection
from megatron_ssu.engine import te_gemm
from megatron_ssu.engine.linear import accumulate_in_gemm, is_engine_linear
from megatron_ssu.engine.mesh import start_processes, stop_processes
from megatron_ssu.models.build import has_transformer_engine
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.layers import SplitRMSNorm
from megatron_ssu.models.parallel_model import open_model
from megatron_ssu.scoring.calibration_pass import MicroBatch, calibration_pass
from megatron_ssu.shield.mask import Mask
from megatron_ssu.shield.shield_file import Shield, load_shield
from megatron_ssu.shield.verify import verify
from megatron_ssu.train import trainer as training
from megatron_ssu.train.trainer import Trainer
from tests.dist import compact_work, work
from tests.dist.test_compact import part_shield
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
    "blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
}
PRECISIONS = pytest.mark.parametrize("precision", [None, *FP8], ids=str)
KINDS = ("column", "row", "element")


def require(precision):
    """Skip a test where this machine does not compute in `precision`."""
    if precision is None:
        return
    if not has_transformer_engine():
        pytest.skip("needs Transformer Engine")
    import transformer_engine.pytorch as te

    supports = te.is_fp8_block_scaling_available if precision == "blockwise" else te.is_fp8_available
    available, reason = supports(return_reason=True)
    if not available:
        pytest.skip(reason)


def no_shield(model):
    return Shield("none", "m", model_fingerprint(model), matrices={}, masks={})


def trainer_of(model, shield, precision=None):
    """A trainer of random tokens in bf16 or FP8."""
    run = work.run_config(
        str(model),
        work.mesh(),
        "bf16",
        data=DataSection(sequence_length=work.LENGTH, loader_workers=0),
        train=TrainSection(iterations=10, micro_batch_size=2, global_batch_size=work.GLOBAL_BATCH),
    )
    run.precision.transformer.update(FP8.get(precision, {}))
    return Trainer(open_model(run), load_shield(shield) if shield else no_shield(model))


def linear_layers(trainer):
    """Modules of Transformer Engine's linear layers."""
    return [module for chunk in trainer.session.chunks for module in chunk.modules() if is_engine_linear(module)]


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


@PRECISIONS
@pytest.mark.parametrize("granularity,fraction", [("column", 0.99), ("row", 0.99), ("element", 0.9)])
def test_no_frozen_bit_moves_and_the_rest_does(granularity, fraction, precision, model, tmp_path):
    require(precision)
    shield = random_shield(model, tmp_path / "shield.safetensors", granularity)
    options = {"dtype": "bf16", "shield_file": str(shield), "target": str(tmp_path / "adapted")}
    found = work.train_steps(str(model), work.mesh(), 20, precision=FP8.get(precision), **options)
    assert all(np.isfinite(loss) for loss, _, _ in found["history"])
    assert found["history"][-1][0] < found["history"][0][0] + 0.5
    assert found["state_bytes"] == 12 * found["owned"]
    assert found["trainable"] <= found["owned"] < 1.12 * found["trainable"]
    report = verify(model, tmp_path / "adapted", shield)
    assert report.ok
    totals = report.totals(granularity)
    assert totals["frozen"] > 0 and totals["moved_trainable"] > fraction * totals["trainable"]


@PRECISIONS
def test_an_empty_shield_is_stock_megatron(precision, model):
    require(precision)
    options = {"dtype": "bf16", "precision": FP8.get(precision), "fused_adam": False}
    stock, ours = (work.train_steps(str(model), work.mesh(), 5, stock=stock, **options) for stock in (True, False))
    assert stock["history"] == ours["history"]
    assert all(torch.equal(a, b) for a, b in zip(stock["weights"], ours["weights"], strict=True))


def compact_gradients(model, shield, precision, gemm):
    """fp32 gradients of the compact parameters by name after the micro-batches of the first step."""
    with mock.patch.object(training, "tried_gemm", lambda config: gemm):
        trainer = trainer_of(model, shield, precision)
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    trainer._schedule(trainer.batches(work.RandomTokens(), 0), trainer.micro_batches, forward_only=False)
    named = trainer.session.chunks[0].named_parameters()
    found = {name: param.main_grad.cpu() for name, param in named if "compact_" in name}
    if engine.HAVE_TE:
        engine.FP8GlobalStateManager.reset()
    return found


@needs_engine
@PRECISIONS
@pytest.mark.parametrize("granularity", ["column", "row"])
def test_compact_gradients_are_picked_from_whole_ones(granularity, precision, model, tmp_path):
    """The same operands, sums in fp32: of a GEMM for what trains, and of the layer's own."""
    require(precision)
    shield = random_shield(model, tmp_path / "shield.safetensors", granularity)
    compact, whole = (compact_gradients(model, shield, precision, gemm) for gemm in (te_gemm.multiply, None))
    assert compact.keys() == whole.keys() and len(compact) > 4 * 7 - 1
    for name, wanted in whole.items():
        assert wanted.abs().max() > 0
        # Attention's backward pass adds up in any order, which moves a few bits of what comes after it.
        assert (compact[name] - wanted).abs().max() < 1e-2 * wanted.abs().max(), name
        assert (compact[name] - wanted).norm() < 5e-3 * wanted.norm(), name


@PRECISIONS
def test_compact_gradients_follow_the_dense_path(precision, model, tmp_path):
    require(precision)
    shield = random_shield(model, tmp_path / "shield.safetensors")
    histories = []
    for trial in (tried_gemm, lambda config: None):
        with mock.patch.object(training, "tried_gemm", trial):
            options = {"dtype": "bf16", "shield_file": str(shield), "precision": FP8.get(precision)}
            histories.append(np.array(work.train_steps(str(model), work.mesh(), 10, **options)["history"]))
    compact, dense = histories
    assert np.allclose(dense[:, 0], compact[:, 0], rtol=5e-3)
    assert np.allclose(dense[:, 1], compact[:, 1], rtol=5e-2)


@needs_engine
@PRECISIONS
def test_the_gemm_of_every_recipe_is_taken(precision, model):
    require(precision)
    run = work.run_config(str(model), work.mesh(), "bf16")
    run.precision.transformer.update(FP8.get(precision, {}))
    assert tried_gemm(open_model(run).config) is te_gemm.multiply


@needs_engine
@PRECISIONS
@pytest.mark.parametrize("granularity", KINDS)
def test_every_linear_layer_takes_part(granularity, precision, model, tmp_path):
    require(precision)
    trainer = trainer_of(model, random_shield(model, tmp_path / "s.safetensors", granularity), precision)
    layers = linear_layers(trainer)
    assert len(layers) == 4 * trainer.session.source.dims.layers
    assert all(isinstance(layer.wgrad_store, CompactStore) for layer in layers)
    gemms = {layer.wgrad_store.multiply for layer in layers}
    assert gemms == ({None} if granularity == "element" else {te_gemm.multiply})
    calls = []
    put = CompactStore.put
    with mock.patch.object(CompactStore, "put", lambda self, *args: (calls.append(self), put(self, *args))[1]):
        trainer.step(trainer.batches(work.RandomTokens(), 0))
    assert {id(store) for store in calls} == {id(layer.wgrad_store) for layer in layers}
    assert len(calls) == len(layers) * trainer.micro_batches
    assert all(layer.weight.grad is None for layer in layers)


@PRECISIONS
@pytest.mark.parametrize("granularity", KINDS)
def test_padding_stays_zero(granularity, precision, model, tmp_path):
    require(precision)
    shield = str(random_shield(model, tmp_path / "shield.safetensors", granularity))
    options = {"precision": FP8.get(precision)}
    count, largest = compact_work.padding_after(str(model), work.mesh(), 5, shield, "bf16", **options)
    assert count > 0 and largest == 0


def test_masks_on_the_gpu_are_those_on_the_cpu(model, tmp_path):
    trainer = trainer_of(model, random_shield(model, tmp_path / "s.safetensors"))
    masks = [matrix.mask for weight in trainer.compact.compact.values() for matrix in weight.matrices]
    masks += [pinned.pinned for pinned in trainer.compact.pinned.values()]
    for mask in masks:
        values = torch.arange(mask.length, dtype=torch.float32)
        assert mask.device.type == "cuda"
        assert torch.equal(mask.compact(values.cuda()).cpu(), mask.to("cpu").compact(values))
    assert len(masks) > 10


def peak_of_a_step(model, shield, precision):
    """Bytes on the GPU at most in a step after the first two, and bytes at its start."""
    trainer = trainer_of(model, shield, precision)
    batches = trainer.batches(work.RandomTokens(), 0)
    for _ in range(3):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        trainer.step(batches)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del trainer, batches
    if engine.HAVE_TE:
        engine.FP8GlobalStateManager.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return peak, before


@PRECISIONS
@pytest.mark.parametrize("granularity", ["column", "row"])
def test_a_step_takes_less_memory_than_stock_s(granularity, precision, tmp_path):
    require(precision)
    sizes = {**SIZES, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16}
    model = make_model("olmo2", tmp_path / "model", torch.bfloat16, **sizes)
    shield = random_shield(model, tmp_path / "shield.safetensors", granularity)
    peak_of_a_step(model, None, precision)  # workspaces, which stay
    stock, ours = (peak_of_a_step(model, file, precision) for file in (None, shield))
    # 18 bytes per element and 11, besides cached FP8 weights, activations and workspaces.
    assert ours[1] < 0.8 * stock[1] and ours[0] < 0.85 * stock[0]


def test_the_kernel_of_adam_can_be_chosen(model):
    histories = [
        work.train_steps(str(model), work.mesh(), 3, dtype="bf16", fused_adam=fused)["history"]
        for fused in (True, False)
    ]
    assert np.allclose(*map(np.array, histories), rtol=1e-2)


@PRECISIONS
def test_wholly_frozen_matrices_and_layers_hold_nothing_else_up(precision, model, tmp_path):
    """Half of every linear weight's columns, all of layer 1, of the MLP of layer 0 and of the last down projection."""
    require(precision)
    path, target, draw = tmp_path / "shield.safetensors", tmp_path / "adapted", np.random.default_rng(0)

    def choose(matrix):
        if not matrix.scored:
            return None
        if any(part in matrix.name for part in ("layers.1.", "layers.0.mlp", "layers.3.mlp.down_proj")):
            return Mask.constant("column", matrix.shape, True)
        return Mask.of("column", matrix.shape, draw.random(matrix.shape[1]) < 0.5)

    part_shield(model, path, choose)
    options = {"dtype": "bf16", "precision": FP8.get(precision), "shield_file": str(path), "target": str(target)}
    found = work.train_steps(str(model), work.mesh(), 20, **options)
    assert all(np.isfinite(loss) and 0 < norm < np.inf for loss, norm, _ in found["history"])
    report = verify(model, target, path)
    totals = report.totals("column")
    assert report.ok and totals["frozen"] > 0 and totals["moved_trainable"] > 0.99 * totals["trainable"]


def test_a_rank_with_nothing_but_frozen_weights_takes_part(model, tmp_path):
    def choose(matrix):
        return Mask.constant("element" if len(matrix.shape) == 1 else "column", matrix.shape, True)

    path = part_shield(model, tmp_path / "shield.safetensors", choose)
    found = work.train_steps(str(model), work.mesh(), 3, dtype="bf16", shield_file=path)
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
def test_layers_without_a_shield_accumulate_in_the_gemm(model, tmp_path):
    for shield, layers in ((None, 4), (random_shield(model, tmp_path / "s.safetensors", "row"), 0)):
        session = open_model(work.run_config(str(model), work.mesh(), "bf16"))
        masks = load_shield(shield) if shield else no_shield(model)
        CompactParameters(session.chunks, session.layout, masks, gemm=te_gemm.multiply)
        assert accumulate_in_gemm(session.chunks) == layers * session.source.dims.layers


@pytest.mark.parametrize("trainable", [1, 7, 8, 15, 16, 17, 63, 100, 128])
def test_compact_gradients_of_any_number_of_columns(trainable):
    """Added in fp32 to what is there, one value of which bf16 would lose the rest."""
    draw = torch.Generator().manual_seed(trainable)
    columns = torch.randperm(128, generator=draw)[:trainable].sort().values
    outputs, x = (torch.randn(64, n, generator=draw).bfloat16() for n in (96, 128))
    input, output = Picked(columns.cuda(), 128, padded(trainable)), Blocks(groups=3, block=32, first=8, count=16)
    found = torch.full((48, padded(trainable)), 1000.0, device="cuda")
    add_gemm(found, output.columns(outputs.cuda()), input.columns(x.cuda()))
    rows = torch.cat([torch.arange(first, first + 16) for first in (8, 40, 72)])
    wanted = outputs.float().t()[rows] @ x.float()[:, columns]
    assert torch.equal(found[:, trainable:].cpu(), torch.full((48, padded(trainable) - trainable), 1000.0))
    assert torch.allclose(found[:, :trainable].cpu() - 1000, wanted, rtol=1e-2, atol=1e-2)


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
    require(recipe)
    outputs = []
    for precision in ({}, FP8[recipe]):
        run = work.run_config(str(model), work.mesh(), "bf16")
        run.precision.transformer.update(precision)
        session = open_model(run)
        session.chunks[0].output_layer.register_forward_hook(lambda _, __, out: outputs.append(out[0].clone()))
        tokens = torch.randint(0, 100, (1, 32), generator=torch.Generator().manual_seed(0)).cuda()
        batch = MicroBatch(tokens, torch.arange(32, device="cuda").expand(1, -1), None)
        calibration_pass(session, [batch], None)
    assert torch.equal(*outputs)
