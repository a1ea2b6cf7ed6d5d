"""KL over a vocabulary against torch's own, its gradient against finite differences, and parts of a vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from megatron_ssu.ops import kl_divergence as module
from megatron_ssu.ops.kl_divergence import kl_divergence


def pair(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return (scale * torch.randn(shape, dtype=dtype)).requires_grad_(), scale * torch.randn(shape, dtype=dtype)


def reference(logits: torch.Tensor, source: torch.Tensor, temperature: float) -> torch.Tensor:
    model, truth = (log_softmax(x / temperature, -1) for x in (logits, source))
    return temperature**2 * kl_div(model, truth, reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_values_and_gradients_are_torchs(temperature):
    logits, source = pair(3, 4, 11)
    weights = torch.rand(3, 4, dtype=torch.float64)
    found, expected = (f(logits, source, temperature) for f in (kl_divergence, reference))
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((value * weights).sum(), logits)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_the_gradient_is_that_of_the_value(temperature):
    logits, source = pair(2, 3, 7)
    assert torch.autograd.gradcheck(lambda x: kl_divergence(x, source, temperature), (logits,))


def test_equal_logits_diverge_nowhere():
    logits, _ = pair(2, 3, 7, dtype=torch.float32)
    found = kl_divergence(logits, logits.detach().clone())
    assert torch.equal(found, torch.zeros(2, 3))
    found.sum().backward()
    assert torch.equal(logits.grad, torch.zeros(2, 3, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.25, 1.0])
def test_padding_of_the_vocabulary_counts_nothing(dtype, temperature):
    logits, source = (x.detach().to(dtype) for x in pair(2, 3, 9))
    logits[..., 6:] = source[..., 6:] = torch.finfo(dtype).min
    found = kl_divergence(logits.requires_grad_(), source, temperature)
    expected = reference(logits.detach()[..., :6].double(), source[..., :6].double(), temperature)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    found.sum().backward()
    assert torch.equal(logits.grad[..., 6:], torch.zeros(2, 3, 3, dtype=dtype))
    assert logits.grad[..., :6].float().abs().min() > 0


def test_bf16_logits_give_fp32_values_and_gradients_within_bf16(dtype=torch.bfloat16):
    logits, source = (x.detach().to(dtype) for x in pair(4, 5, 50))
    exact = logits.double().requires_grad_()
    found = kl_divergence(logits.requires_grad_(), source, 2.0)
    assert found.dtype == torch.float32
    expected = reference(exact, source.double(), 2.0)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    found.sum().backward(), expected.sum().backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-9, rtol=1e-2)


def test_the_logits_may_be_overwritten_afterwards():
    logits, source = pair(2, 3, 7)
    through = logits * 1.0
    found = kl_divergence(through, source)
    with torch.no_grad():
        through.zero_()
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(reference(logits, source, 1.0).sum(), logits)[0])


def test_blocks_of_tokens_change_nothing(monkeypatch):
    logits, source = pair(5, 7, 13)
    whole = kl_divergence(logits, source, 2.0)
    (gradient,) = torch.autograd.grad(whole.sum(), logits)
    monkeypatch.setattr(module, "_ELEMENTS", 4 * 13 + 1)
    blocks = kl_divergence(logits, source, 2.0)
    assert torch.equal(whole, blocks)
    assert torch.equal(gradient, torch.autograd.grad(blocks.sum(), logits)[0])
