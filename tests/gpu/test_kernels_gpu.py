"""The CUDA kernels against the torch fallback on the GPU and on CPU, to the bit."""

from __future__ import annotations

import pytest
import torch

from megatron_ssu.compact.shards import RowRun, ShardMask
from megatron_ssu.ops import kernels
from tests.unit.mask_cases import DTYPES, bits, by_torch, gathered, random_bits, random_case, same_bits, scattered

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
needs_kernels = pytest.mark.skipif(
    kernels.backend("cuda") == "torch", reason=kernels.why_torch("cuda") or "kernels are built"
)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(100))
def test_cuda_kernels_equal_plain_indexing(seed: int, dtype: torch.dtype) -> None:
    case = random_case(seed, dtype)
    mask, full = case.mask.to("cuda"), case.full.cuda()
    assert same_bits(mask.compact(full).cpu(), gathered(case))
    mask.scatter(case.values.cuda(), full)
    assert same_bits(full.cpu(), scattered(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(30))
def test_fallback_on_cuda_equals_plain_indexing(seed: int, dtype: torch.dtype) -> None:
    case = random_case(seed, dtype)
    mask, full = case.mask.to("cuda"), case.full.cuda()
    out = torch.zeros(mask.size, dtype=dtype, device="cuda")
    kernels.torch_gather(mask, full, out)
    assert same_bits(out.cpu(), gathered(case))
    kernels.torch_scatter(mask, case.values.cuda(), full)
    assert same_bits(full.cpu(), scattered(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "inputs", "width"), [(1, 1, 1), (3, 5, 16), (130, 333, 352), (700, 4099, 4112)])
def test_column_gather_equals_indexing(tokens: int, inputs: int, width: int, dtype: torch.dtype) -> None:
    x = random_bits(tokens * inputs, dtype).view(tokens, inputs).cuda()
    for share in (0.0, 0.1, 0.5, 1.0):
        columns = (torch.rand(inputs) < share).nonzero().view(-1).cuda()
        wanted = torch.zeros(tokens, width, dtype=dtype, device="cuda")
        bits(wanted)[:, : columns.numel()] = bits(x)[:, columns]
        gather = kernels.ColumnGather(columns, inputs, width)
        assert gather.device == x.device and gather.to(x.device) is gather
        assert same_bits(gather(x), wanted) and same_bits(by_torch(gather, x), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "inputs", "widths"),
    [(1, 1, (1, 16)), (17, 130, (130, 144, 0)), (131, 1030, (1056, 1040, 1030, 1200, 1040)), (700, 4099, (4112,) * 3)],
)
def test_several_sets_of_columns_are_what_each_gathers(
    tokens: int, inputs: int, widths: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = random_bits(tokens * inputs, dtype).view(tokens, inputs).cuda()
    gathers = [
        kernels.ColumnGather((torch.rand(inputs) < share * (width > 0)).nonzero().view(-1).cuda(), inputs, width)
        for width, share in zip(widths, (0.5, 0.1, 1.0, 0.0, 0.7), strict=False)
    ]
    for found, gather in zip(kernels.gather_columns(gathers, x), gathers, strict=True):
        assert same_bits(found, by_torch(gather, x))


@needs_kernels
def test_more_than_two_to_the_31_elements() -> None:
    rows, width = (1 << 17) + 3, 1 << 14
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GiB of free GPU memory")
    columns = torch.arange(0, width, 2)
    mask = ShardMask.from_patterns((rows, width), [RowRun(0, rows, 0)], [columns]).to("cuda")
    full = torch.zeros(mask.length, dtype=torch.bfloat16, device="cuda")
    full[-2 * width :: 2] = 3.0  # even columns of the last two rows
    out = mask.compact(full)
    assert out[-width:].eq(3.0).all() and out[:-width].eq(0.0).all()


@needs_kernels
def test_kernels_run_on_the_current_stream() -> None:
    mask = ShardMask.from_bits((512, 512), torch.rand(512, 512) < 0.5).to("cuda")
    stream = torch.cuda.Stream()
    full = torch.zeros(512 * 512, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        full.fill_(1.0)
        out = mask.compact(full)
    stream.synchronize()
    assert out.eq(1.0).all()
