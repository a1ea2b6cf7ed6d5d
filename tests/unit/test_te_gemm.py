"""Operands of compact weight gradients in Transformer Engine's formats, with stand-ins for its tensors and its GEMM."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ssu.compact.selection import Blocks, Everything, Picked, Together, Workspace
from megatron_ssu.engine import te_gemm

TOKENS, INPUTS = 256, 40
COLUMNS = torch.tensor([1, 3, 8, 21, 39])
INPUT = Picked(COLUMNS, INPUTS, 16)
OUTPUT = Blocks(groups=3, block=8, first=2, count=4)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Transformer Engine's module with tensor classes that keep what they are given; the calls of its GEMM."""
    calls: list[Any] = []
    module = ModuleType("transformer_engine.pytorch")
    extensions = ModuleType("transformer_engine.pytorch.cpp_extensions")
    module.Float8TensorStorage = SimpleNamespace  # type: ignore[attr-defined]
    module.Float8BlockwiseQTensorStorage = SimpleNamespace  # type: ignore[attr-defined]
    extensions.general_gemm = lambda *args, **kwargs: calls.append((args, kwargs))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.cpp_extensions", extensions)
    return calls


def per_tensor(width: int) -> Any:
    data = torch.randint(0, 255, (width, TOKENS), dtype=torch.uint8)
    return SimpleNamespace(
        _transpose=data,
        _transpose_invalid=False,
        _scale_inv=torch.ones(1),
        _fp8_dtype="e4m3",
        _dtype=torch.bfloat16,
        _quantizer="q",
    )


def test_bf16_operands_are_columns() -> None:
    x = torch.randn(TOKENS, INPUTS).bfloat16()
    found = te_gemm.select(x, INPUT)
    assert found.shape == (TOKENS, 16) and torch.equal(found[:, :5], x[:, COLUMNS]) and not found[:, 5:].any()
    grad_output = torch.randn(TOKENS, 24).bfloat16()
    found = te_gemm.select(grad_output, OUTPUT)
    assert found.is_contiguous()
    assert torch.equal(found, grad_output[:, [2, 3, 4, 5, 10, 11, 12, 13, 18, 19, 20, 21]])
    assert torch.equal(te_gemm.select(x, Everything()), x)


def test_inputs_may_have_the_dimensions_of_a_sequence(engine: list[Any]) -> None:
    """Transformer Engine's layers hand over their input as it came, [s, b, I]; their output gradient is flat."""
    x = torch.randn(TOKENS // 2, 2, INPUTS).bfloat16()
    assert torch.equal(te_gemm.select(x, INPUT)[:, :5], x.view(TOKENS, INPUTS)[:, COLUMNS])
    quantised = per_tensor(INPUTS)
    quantised._transpose = quantised._transpose.view(INPUTS, TOKENS // 2, 2)
    assert te_gemm.select(quantised, INPUT).data_transpose.shape == (16, TOKENS)


def test_fp8_operands_of_one_scale_are_rows_of_the_transpose(engine: list[Any]) -> None:
    x = per_tensor(INPUTS)
    found = te_gemm.select(x, INPUT)
    assert found.data is None and found.data_transpose.shape == (16, TOKENS)
    assert torch.equal(found.data_transpose[:5], x._transpose[COLUMNS]) and not found.data_transpose[5:].any()
    assert (found.fp8_scale_inv, found.fp8_dtype, found.quantizer) == (x._scale_inv, "e4m3", None)
    assert found.fake_dtype == torch.bfloat16
    rows = te_gemm.select(per_tensor(24), OUTPUT).data_transpose
    assert rows.shape == (12, TOKENS) and rows.is_contiguous()


def test_fp8_operands_of_one_scale_per_block_take_their_scales_along(engine: list[Any]) -> None:
    data = torch.randint(0, 255, (INPUTS, TOKENS), dtype=torch.uint8)
    scales = torch.rand(TOKENS // 128, INPUTS)
    x = SimpleNamespace(
        _columnwise_data=data,
        _columnwise_scale_inv=scales,
        _is_2D_scaled=False,
        _fp8_dtype="e4m3",
        _dtype=torch.bfloat16,
        _quantizer="q",
    )
    found = te_gemm.select(x, INPUT)
    assert torch.equal(found.columnwise_data[:5], data[COLUMNS]) and not found.columnwise_data[5:].any()
    assert found.columnwise_scale_inv.shape == (TOKENS // 128, 16)
    assert torch.equal(found.columnwise_scale_inv[:, :5], scales[:, COLUMNS])
    assert found.is_2D_scaled is False and found.rowwise_data is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("blocks", [(3, 32, 8, 16), (3, 32, 8, 9), (2, 5, 1, 3), (1, 96, 5, 40)], ids=str)
def test_blocks_are_copied_whatever_their_alignment(blocks: tuple[int, ...], dtype: torch.dtype) -> None:
    groups, block, first, count = blocks
    index = torch.cat([torch.arange(count) + first + i * block for i in range(groups)])
    for tokens in (16, 7):
        x = torch.randint(0, 255, (tokens, groups * block)).to(dtype)
        assert torch.equal(Blocks(*blocks).columns(x), x[:, index])
        assert torch.equal(Blocks(*blocks).rows(x.t().contiguous()), x.t()[index])
        assert torch.equal(Blocks(*blocks).columns(x[1:]), x[1:, index])


@pytest.mark.parametrize(
    "operand",
    [
        SimpleNamespace(_transpose=None, _transpose_invalid=True),
        SimpleNamespace(_columnwise_data=torch.zeros(1), _is_2D_scaled=True),
        SimpleNamespace(_rowwise_data=None),
    ],
)
def test_other_operands_are_refused(operand: Any, engine: list[Any]) -> None:
    with pytest.raises(TypeError):
        te_gemm.select(operand, INPUT)


def test_the_gemm_adds_to_the_gradient_in_fp32(engine: list[Any]) -> None:
    gradient = torch.zeros(12, 16)
    te_gemm.multiply([gradient], per_tensor(INPUTS), per_tensor(24), Together([INPUT], Workspace()), [OUTPUT])
    ((x, grad_output), options) = engine[0]
    assert x.data_transpose.shape == (16, TOKENS) and grad_output.data_transpose.shape == (12, TOKENS)
    assert options["out"] is gradient and options["accumulate"] and options["layout"] == "NT"
    assert options["out_dtype"] == torch.float32


def test_matrices_of_a_weight_have_a_gemm_each(engine: list[Any]) -> None:
    """Columns of a plain tensor are gathered in one pass, rows of an FP8 transpose per matrix."""
    other, wider = torch.tensor([0, 2, 3, 17]), torch.arange(20)
    inputs = Together([INPUT, Picked(other, INPUTS, 16), Everything(), Picked(wider, INPUTS, 32)], Workspace())
    outputs = [OUTPUT, Everything(), OUTPUT, Everything()]
    gradients = [torch.zeros(1) for _ in range(4)]
    x, grad_output = (torch.randn(TOKENS // 2, 2, n).bfloat16() for n in (INPUTS, 24))
    te_gemm.multiply(gradients, x, grad_output, inputs, outputs)
    te_gemm.multiply(gradients, per_tensor(INPUTS), per_tensor(24), inputs, outputs)
    plain, quantised = engine[:4], engine[4:]
    assert len(quantised) == 4
    for ((found, dy), options), gradient, input, output in zip(plain, gradients, inputs, outputs, strict=True):
        assert torch.equal(found, te_gemm.select(x, input)) and found.is_contiguous()
        assert torch.equal(dy, te_gemm.select(grad_output, output)) and options["out"] is gradient
    assert [x.data_transpose.shape[0] for (x, _), _ in quantised] == [16, 16, INPUTS, 32]
    assert [dy.data_transpose.shape[0] for (_, dy), _ in quantised] == [12, 24, 12, 24]
