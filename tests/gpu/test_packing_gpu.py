"""One GPU: packed documents that do not attend to each other have loss and gradients of the same documents one by one."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from megatron_ssu.data.packing import Layout, sample_of
from megatron_ssu.engine.mesh import start_processes, stop_processes
from tests.dist import packing_work as work
from tests.dist.test_packing import S, documents, expected, rows_of
from tests.dist.work import mesh
from tests.gpu.test_training_gpu import FP8, SIZES, needs_engine, require
from tests.models import make_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def alone(found):
    """Every document in a row of its own."""
    return [sample_of([document], Layout(S, 7, False)) for document in found]


def computed(model, target, samples, micro, **options):
    """Loss of training, of evaluation, and gradients by name."""
    if options.get("precision"):
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        FP8GlobalStateManager.reset()
    start_processes()
    try:
        result = work.gradients(str(model), mesh(), samples, micro, str(target), **options)
    finally:
        stop_processes()
    return result["loss"], result["evaluated"], load_file(f"{target}/model.safetensors")


def apart(first, second):
    """Relative distance of two sets of gradients."""
    difference = sum((first[name].float() - second[name].float()).square().sum() for name in first)
    return float((difference / sum(value.float().square().sum() for value in first.values())).sqrt())


def errors_in_fp32(kind, micro, folder):
    """By what it is compared with: the largest errors of the losses and of a gradient of packed rows."""
    model = make_model(kind, folder / "model", torch.float32, **SIZES)
    found = documents()
    loss, evaluated, packed = computed(model, folder / "packed", rows_of(found), micro)
    wanted, _, single = computed(model, folder / "single", alone(found), 1, isolated=False)
    largest = {}
    for name, other, gradients in (("one by one", wanted, single), ("transformers", *expected(model, found))):
        errors = [float((packed[key] - gradient).abs().max()) for key, gradient in gradients.items()]
        largest[name] = max(abs(loss - other), abs(evaluated - other), *errors)
    return largest


@pytest.fixture(scope="module")
def without_tf32():
    """A process whose matrix products are in fp32; cuBLAS reads the variable when it starts."""
    with mock.patch.dict(os.environ, NVIDIA_TF32_OVERRIDE="0"):
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            yield pool


@needs_engine
@pytest.mark.parametrize("micro", [1, 2, 8])
@pytest.mark.parametrize("kind", ["olmo2", "llama3"])
def test_in_fp32_they_are_the_same(kind, micro, without_tf32, tmp_path):
    found = without_tf32.submit(errors_in_fp32, kind, micro, tmp_path).result(timeout=300)
    assert max(found.values()) < 1e-5, found


@needs_engine
@pytest.mark.parametrize("precision", [None, *FP8], ids=str)
def test_bf16_and_fp8_are_within_their_rounding(precision, tmp_path):
    """The control, rows whose documents see each other, is far beyond it."""
    require(precision)
    model = make_model("olmo2", tmp_path / "model", torch.bfloat16, **SIZES)
    found = documents()
    options = {"dtype": "bf16", "precision": FP8.get(precision)}
    loss, evaluated, packed = computed(model, tmp_path / "packed", rows_of(found), 4, **options)
    wanted, _, single = computed(model, tmp_path / "single", alone(found), 1, isolated=False, **options)
    seen = rows_of(found, isolated=False)
    _, _, together = computed(model, tmp_path / "together", seen, 4, isolated=False, **options)
    assert loss == pytest.approx(wanted, rel=5e-3) and evaluated == pytest.approx(wanted, rel=5e-3)
    limit = 0.02 if precision is None else 0.4
    assert apart(single, packed) < limit < apart(single, together)
