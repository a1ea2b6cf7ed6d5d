"""The C++ kernels and the torch fallback against `full[mask]`, to the bit, and the core under AddressSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_ssu.shield import kernels
from megatron_ssu.shield.shards import RowRun, ShardMask
from tests.unit.mask_cases import Case, random_case, same_bits

CSRC = Path(__file__).parents[2] / "csrc"
needs_extension = pytest.mark.skipif(kernels.backend() == "torch", reason=kernels.why_torch())
LEVELS = range(kernels._LEVEL + 1)


def naive(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """What gather and scatter should give."""
    gathered = case.full[case.trainable].to(torch.float32)
    scattered = case.full.clone()
    scattered[case.trainable] = case.values.to(case.full.dtype)
    return gathered, scattered


def guarded(length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer with sevens around, and its inner view: nothing may be written outside."""
    whole = torch.full((length + 40,), 7.0, dtype=dtype)
    return whole, whole[20 : 20 + length]


def edges_intact(whole: torch.Tensor) -> bool:
    return bool((whole[:20] == 7.0).all() and (whole[-20:] == 7.0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(70))
def test_fallback_and_dispatch_equal_naive_indexing(seed: int, dtype: torch.dtype) -> None:
    case = random_case(seed, dtype)
    gathered, scattered = naive(case)
    assert case.mask.numel == int(case.trainable.sum())
    for gather, scatter in ((kernels.torch_gather, kernels.torch_scatter), (kernels.gather, kernels.scatter)):
        whole, out = guarded(case.mask.numel, torch.float32)
        gather(case.mask, case.full, out)
        assert same_bits(out, gathered) and edges_intact(whole)
        whole, full = guarded(case.mask.length, dtype)
        full.copy_(case.full)
        scatter(case.mask, case.values, full)
        assert same_bits(full, scattered) and edges_intact(whole)


@needs_extension
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_simd_level_equals_naive_indexing(level: int, dtype: torch.dtype) -> None:
    for seed in range(1000, 1070):
        case = random_case(seed, dtype)
        gathered, scattered = naive(case)
        whole, out = guarded(case.mask.numel, torch.float32)
        kernels._extension_gather(case.mask, case.full, out, level)
        assert same_bits(out, gathered) and edges_intact(whole), seed
        whole, full = guarded(case.mask.length, dtype)
        full.copy_(case.full)
        kernels._extension_scatter(case.mask, case.values, full, level)
        assert same_bits(full, scattered) and edges_intact(whole), seed


@needs_extension
def test_every_float_rounds_as_torch_rounds() -> None:
    """All bfloat16 neighbourhoods: each upper half with lower halves around the rounding points."""
    upper = torch.arange(1 << 16, dtype=torch.int64)[:, None] << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (upper | lower).view(-1)
    values = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)
    mask = ShardMask.from_bits((1, values.numel() + 1), torch.arange(values.numel() + 1) == 0, 0, values.numel() + 1)
    for level in LEVELS:
        full = torch.zeros(values.numel() + 1, dtype=torch.bfloat16)
        kernels._extension_scatter(mask, values, full, level)
        assert same_bits(full[1:], values.to(torch.bfloat16))


@needs_extension
@pytest.mark.parametrize("elements", [False, True])
def test_thread_counts_do_not_matter(elements: bool) -> None:
    rows, width = 301, 517
    frozen = torch.rand(width) < 0.5
    if elements:
        mask = ShardMask.from_bits((rows, width), torch.rand(rows, width) < 0.5, 3, rows * width - 100)
    else:
        runs = [RowRun(0, 100, 0), RowRun(100, 102, 1), RowRun(102, rows, 0)]
        mask = ShardMask.from_patterns((rows, width), runs, [(~frozen).nonzero().view(-1), None], 3, rows * width - 100)
    full = torch.randn(mask.length).bfloat16()
    expected = torch.empty(mask.numel)
    kernels.torch_gather(mask, full, expected)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(mask.compact(full), expected)
            back = torch.zeros_like(full)
            mask.scatter(expected, back)
            assert torch.equal(mask.compact(back), expected) and int((back != 0).sum()) <= mask.numel
    finally:
        torch.set_num_threads(before)


@needs_extension
@pytest.mark.parametrize("elements", [False, True])
def test_outputs_larger_than_the_caches(elements: bool) -> None:
    """More than 2^20 trainable elements: other stores, through a buffer; every thread's stretch starts anywhere."""
    rows, width = 1200, 2003
    if elements:
        mask = ShardMask.from_bits((rows, width), torch.rand(rows, width) < 0.5, 5, rows * width - 3)
    else:
        patterns = [(torch.rand(width) < share).nonzero().view(-1) for share in (0.5, 0.1)]
        runs = [RowRun(0, 700, 0), RowRun(700, 720, 1), RowRun(720, 900, 2), RowRun(900, rows, 0)]
        mask = ShardMask.from_patterns((rows, width), runs, [*patterns, None], 5, rows * width - 3)
    assert mask.numel > 1 << 20
    before = torch.get_num_threads()
    try:
        for dtype in (torch.float32, torch.bfloat16):
            full = torch.randn(mask.length).to(dtype)
            expected = torch.empty(mask.numel)
            kernels.torch_gather(mask, full, expected)
            for level in LEVELS:
                for threads in (1, 2, 5):
                    torch.set_num_threads(threads)
                    whole, out = guarded(mask.numel, torch.float32)
                    kernels._extension_gather(mask, full, out, level)
                    assert same_bits(out, expected) and edges_intact(whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 513), (300, 1030), (0, 5)], ids=str)
@pytest.mark.parametrize("square", [False, True])
def test_column_sums(shape: tuple[int, int], dtype: torch.dtype, square: bool) -> None:
    weight = torch.randn(shape).to(dtype)
    wide = weight.double()
    expected = (wide.square() if square else wide.abs()).sum(dim=0)
    for given in (weight, weight.t().contiguous().t()):
        sums = kernels.column_sums(given, square=square)
        assert sums.dtype == torch.float64
        torch.testing.assert_close(sums, expected, rtol=1e-13, atol=0)


def test_backend_says_why_it_is_torch() -> None:
    for device in ("cpu", "cuda"):
        assert (kernels.backend(device) == "torch") == bool(kernels.why_torch(device))


@pytest.mark.slow
def test_core_under_address_sanitizer(tmp_path: Path) -> None:
    """csrc/tests/driver.cpp: random masks in exactly sized heap buffers, compared with a plain loop."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    program = tmp_path / "driver"
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fopenmp"]
    command = [compiler, *flags, f"-I{CSRC}", str(CSRC / "tests" / "driver.cpp"), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode != 0 and ("lasan" in built.stderr or "lubsan" in built.stderr):
        pytest.skip("the sanitizer libraries are not installed")
    assert built.returncode == 0, built.stderr
    # leak detection needs ptrace, which containers often forbid; what is looked for here is access out of bounds
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    ran = subprocess.run([str(program), "400"], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "400 cases" in ran.stdout
