"""OLMo-2's q and k norm is the same function, with the same gradients, on one rank and on two that split its heads."""

from __future__ import annotations

import torch

from tests.dist.norm_work import norm_with_gradients


def test_a_split_norm_equals_the_whole_one(ranks):
    (whole,) = ranks.run(norm_with_gradients, 1, 1)
    parts = ranks.run(norm_with_gradients, 2, 2)
    joined = [torch.cat(tensors, dim) for tensors, dim in zip(zip(*parts, strict=True), (2, 2, 0), strict=True)]
    for found, wanted in zip(joined, whole, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)
