"""The norm whose row is split over ranks: values and gradients of torch's, and what it keeps for the backward pass."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_ssu.models.layers import SplitRMSNorm

TOKENS, HEADS, SIZE, EPS = (5, 3), 4, 8, 1e-6
WIDTH = HEADS * SIZE


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def tensors(dtype):
    """Input (a strided part of a larger tensor, as q is of q, k, v), weight and gradient of the output."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(*TOKENS, HEADS, 3 * SIZE, generator=draw)[..., :SIZE].to(dtype)
    weight = (1 + 0.2 * torch.randn(HEADS, SIZE, generator=draw)).to(dtype)
    grad = torch.randn(*TOKENS, HEADS, SIZE, generator=draw).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), grad


def reference(x, weight, grad):
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    y = torch.nn.functional.rms_norm(x.flatten(2), (WIDTH,), weight.flatten(), EPS).view(x.shape)
    y.backward(grad.double())
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)], ids=["fp32", "bf16"])
def test_values_and_gradients_are_those_of_torch(dtype, tolerance, group):
    x, weight, grad = tensors(dtype)
    y = SplitRMSNorm.apply(x, weight, WIDTH, EPS, group)
    y.backward(grad)
    for found, wanted in zip((y, x.grad, weight.grad), reference(x, weight, grad), strict=True):
        assert found.dtype == dtype
        assert torch.allclose(found.double(), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def test_only_the_input_and_one_number_per_token_are_kept(group):
    x, weight, _ = tensors(torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        SplitRMSNorm.apply(x, weight, WIDTH, EPS, group)
    tokens = TOKENS[0] * TOKENS[1]
    assert sum(t.nbytes for t in kept) == 2 * tokens * WIDTH + 4 * tokens + 2 * WIDTH
