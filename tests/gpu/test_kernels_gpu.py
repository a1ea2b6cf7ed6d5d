"""The CUDA kernels against the torch fallback on the GPU and on CPU, to the bit."""

from __future__ import annotations

import pytest
import torch

from megatron_ssu.shield import kernels
from megatron_ssu.shield.shards import RowRun, ShardMask
from tests.unit.mask_cases import random_case, same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
needs_kernels = pytest.mark.skipif(
    kernels.backend("cuda") == "torch", reason=kernels.why_torch("cuda") or "kernels are built"
)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(100))
def test_cuda_kernels_equal_torch(seed: int, dtype: torch.dtype) -> None:
    case = random_case(seed, dtype)
    mask, trainable = case.mask.to("cuda"), case.trainable.cuda()
    full, values = case.full.cuda(), case.values.cuda()
    assert same_bits(mask.compact(full), full[trainable].float())
    scattered = full.clone()
    mask.scatter(values, scattered)
    wanted = full.clone()
    wanted[trainable] = values.to(dtype)
    assert same_bits(scattered, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(30))
def test_fallback_on_cuda_equals_cpu(seed: int, dtype: torch.dtype) -> None:
    case = random_case(seed, dtype)
    # NaN bits differ between torch on CPU and on CUDA, narrowed and, from fp16, widened.
    source, finite = torch.nan_to_num(case.full), torch.nan_to_num(case.values)
    mask, full = case.mask.to("cuda"), source.cuda()
    out = torch.empty(mask.numel, device="cuda")
    kernels.torch_gather(mask, full, out)
    assert same_bits(out.cpu(), source[case.trainable].float())
    kernels.torch_scatter(mask, finite.cuda(), full)
    wanted = source.clone()
    wanted[case.trainable] = finite.to(dtype)
    assert same_bits(full.cpu(), wanted)


@needs_kernels
def test_more_than_two_to_the_31_elements() -> None:
    rows, width = (1 << 17) + 3, 1 << 14
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GiB of free GPU memory")
    columns = torch.arange(0, width, 2)
    mask = ShardMask.from_patterns((rows, width), [RowRun(0, rows, 0)], [columns], 1, rows * width).to("cuda")
    full = torch.zeros(mask.length, dtype=torch.bfloat16, device="cuda")
    full[-2 * width :: 2] = 3.0  # even columns of the last two rows
    out = mask.compact(full)
    assert out[-width:].eq(3.0).all() and out[:-width].eq(0.0).all()


@needs_kernels
def test_kernels_run_on_the_current_stream() -> None:
    mask = ShardMask.from_bits((512, 512), torch.rand(512, 512) < 0.5, 0, 512 * 512).to("cuda")
    stream = torch.cuda.Stream()
    full = torch.zeros(512 * 512, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        full.fill_(1.0)
        out = mask.compact(full)
    stream.synchronize()
    assert out.eq(1.0).all()
