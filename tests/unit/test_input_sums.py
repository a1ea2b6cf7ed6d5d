"""Sums of squares by column: each way to them against float64."""

from __future__ import annotations

import pytest
import torch

from megatron_ssu.scoring import input_statistics as inputs


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_of_squares(tokens, dtype, monkeypatch):
    x = torch.randn(tokens, 37, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = x.double().square().sum(0)
    ways = [inputs.sum_of_squares(x), inputs._sum_by_norms(x)]
    monkeypatch.setattr(inputs.kernels, "backend", lambda device: "torch")
    ways += [inputs.sum_of_squares(x), inputs.sum_of_squares(x.t().contiguous().t())]
    for found in ways:
        assert found.dtype == torch.float64 and found.shape == (37,)
        assert torch.allclose(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_stay(bad):
    x = torch.ones(70, 3)
    x[5, 1] = bad
    for found in (inputs.sum_of_squares(x), inputs._sum_by_norms(x)):
        assert torch.isfinite(found).tolist() == [True, False, True]
