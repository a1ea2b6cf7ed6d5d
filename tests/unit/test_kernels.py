"""The C++ kernels and the torch fallback against plain indexing, to the bit, and the core under AddressSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megatron_ssu.compact.shards import RowRun, ShardMask
from megatron_ssu.ops import kernels
from tests.unit.mask_cases import (
    DTYPES,
    Case,
    bits,
    by_extension,
    by_torch,
    gathered,
    random_bits,
    random_case,
    same_bits,
    scattered,
)

CSRC = Path(__file__).parents[2] / "csrc"
needs_extension = pytest.mark.skipif(kernels.backend() == "torch", reason=kernels.why_torch())
LEVELS = range(kernels._LEVEL + 1)
Move = Callable[[ShardMask, torch.Tensor, torch.Tensor], None]


def guarded(inner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer with sevens around a copy of `inner`, and the copy: nothing may be written outside."""
    whole = torch.full((inner.numel() + 40,), 7.0, dtype=inner.dtype)
    whole[20:-20].view(torch.int8).copy_(inner.view(torch.int8))
    return whole, whole[20:-20]


def edges_intact(whole: torch.Tensor) -> bool:
    return bool((whole[:20] == 7.0).all() and (whole[-20:] == 7.0).all())


def check(case: Case, gather: Move, scatter: Move) -> None:
    """Both against plain indexing; `out` is zero before, so that padding that is written shows."""
    whole, out = guarded(torch.zeros(case.mask.size, dtype=case.full.dtype))
    gather(case.mask, case.full, out)
    assert same_bits(out, gathered(case)) and edges_intact(whole)
    whole, full = guarded(case.full)
    scatter(case.mask, case.values, full)
    assert same_bits(full, scattered(case)) and edges_intact(whole)


@contextmanager
def threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(70))
def test_fallback_and_dispatch_equal_plain_indexing(seed: int, dtype: torch.dtype) -> None:
    case = random_case(seed, dtype)
    assert case.mask.numel == case.places.numel()
    check(case, kernels.torch_gather, kernels.torch_scatter)
    check(case, kernels.gather, kernels.scatter)


@needs_extension
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_simd_level_equals_plain_indexing(level: int, dtype: torch.dtype) -> None:
    def gather(mask: ShardMask, src: torch.Tensor, out: torch.Tensor) -> None:
        kernels._extension_gather(mask, src, out, level)

    def scatter(mask: ShardMask, values: torch.Tensor, dst: torch.Tensor) -> None:
        kernels._extension_scatter(mask, values, dst, level)

    for seed in range(1000, 1070):
        check(random_case(seed, dtype), gather, scatter)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_any_dtype_of_two_or_four_bytes_will_do(dtype: torch.dtype) -> None:
    check(random_case(4, dtype), kernels.gather, kernels.scatter)


@needs_extension
@pytest.mark.parametrize(("elements", "stride"), [(False, 0), (False, 528), (True, 0)])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_thread_counts_do_not_matter(elements: bool, stride: int, dtype: torch.dtype) -> None:
    rows, width = 301, 517
    if elements:
        mask = ShardMask.from_bits((rows, width), torch.rand(rows, width) < 0.5)
    else:
        patterns = [(torch.rand(width) < share).nonzero().view(-1) for share in (0.5, 0.1)]
        runs = [RowRun(0, 140, 0), RowRun(140, 144, 1), RowRun(144, 180, 2), RowRun(180, rows, 0)]
        mask = ShardMask.from_patterns((rows, width), runs, [*patterns, None], stride)
    full = random_bits(mask.length, dtype)
    values, back = torch.zeros(mask.size, dtype=dtype), torch.zeros(mask.length, dtype=dtype)
    kernels.torch_gather(mask, full, values)
    kernels.torch_scatter(mask, values, back)
    with threads_restored():
        for level in LEVELS:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                whole, out = guarded(torch.zeros_like(values))
                kernels._extension_gather(mask, full, out, level)
                assert same_bits(out, values) and edges_intact(whole)
                whole, out = guarded(torch.zeros_like(back))
                kernels._extension_scatter(mask, values, out, level)
                assert same_bits(out, back) and edges_intact(whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "inputs", "width"),
    [(1, 1, 1), (3, 5, 16), (17, 130, 130), (40, 333, 352), (1500, 2003, 2016), (0, 8, 8)],
)
def test_column_gather_equals_indexing(tokens: int, inputs: int, width: int, dtype: torch.dtype) -> None:
    x = random_bits(tokens * inputs, dtype).view(tokens, inputs)
    for share in (0.0, 0.1, 0.5, 1.0):
        columns = (torch.rand(inputs) < share).nonzero().view(-1)
        wanted = torch.zeros(tokens, width, dtype=dtype)
        bits(wanted)[:, : columns.numel()] = bits(x)[:, columns]
        gather = kernels.ColumnGather(columns, inputs, width)
        assert same_bits(gather(x), wanted) and same_bits(by_torch(gather, x), wanted)
        if kernels.backend() == "torch" or tokens == 0:
            continue
        with threads_restored():
            for level in LEVELS:
                for threads in (1, 3):
                    torch.set_num_threads(threads)
                    assert same_bits(by_extension([gather], x, level)[0], wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "inputs", "widths"),
    [(1, 1, (1, 16)), (17, 130, (130, 144, 0)), (40, 1030, (1056, 1040, 1030, 1200, 1040)), (0, 8, (8, 16))],
)
def test_several_sets_of_columns_are_what_each_gathers(
    tokens: int, inputs: int, widths: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = random_bits(tokens * inputs, dtype).view(tokens, inputs)
    gathers = [
        kernels.ColumnGather((torch.rand(inputs) < share * (width > 0)).nonzero().view(-1), inputs, width)
        for width, share in zip(widths, (0.5, 0.1, 1.0, 0.0, 0.7), strict=False)
    ]
    wanted = [by_torch(gather, x) for gather in gathers]
    calls = [kernels.gather_columns(gathers, x)]
    with threads_restored():
        for level in LEVELS if kernels.backend() != "torch" and tokens else ():
            for threads in (1, 3):
                torch.set_num_threads(threads)
                calls.append(by_extension(gathers, x, level))
    assert all(same_bits(a, b) for found in calls for a, b in zip(found, wanted, strict=True))


def test_cuda_finds_where_the_columns_of_a_tile_start() -> None:
    tile = kernels.TILE_COLUMNS
    gather = kernels.ColumnGather(torch.tensor([1, 2, tile - 1, 2 * tile, 2 * tile + 5]), 2 * tile + 6, 16)
    assert gather.starts.tolist() == [0, 3, 3, 16]
    assert gather.columns[5:].eq(-1).all() and gather.columns.numel() == 16


def test_column_gather_is_outside_autograd() -> None:
    gather = kernels.ColumnGather(torch.tensor([1, 2]), 4, 2)
    x = torch.randn(3, 4, requires_grad=True)
    for out in (gather(x), by_torch(gather, x)):
        assert not out.requires_grad and torch.equal(out, x[:, 1:3])


def test_column_gather_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="ascend"):
        kernels.ColumnGather(torch.tensor([1, 4]), 4, 4)
    with pytest.raises(ValueError, match="2 columns do not fit into 1"):
        kernels.ColumnGather(torch.tensor([1, 2]), 4, 1)
    gather = kernels.ColumnGather(torch.tensor([1, 2]), 4, 2)
    assert gather.to("cpu") is gather
    for x in (torch.zeros(4), torch.zeros(3, 5), torch.zeros(4, 3).t(), torch.zeros(3, 4, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"contiguous \[T, 4\]"):
            gather(x)
    with pytest.raises(ValueError, match=r"contiguous \[T, 5\]"):
        kernels.gather_columns([gather, kernels.ColumnGather(torch.tensor([1]), 5, 1)], torch.zeros(3, 4))
    with pytest.raises(ValueError, match="columns are on cpu"):
        gather(torch.zeros(3, 4, device="meta"))


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
