"""What ranks do for test_norms.py: a norm over a whole projection, its heads split over tensor-parallel ranks."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from megatron_ssu.engine.mesh import start_mesh
from megatron_ssu.models.layers import ProjectionRMSNorm

HEADS, SIZE = 4, 8


def norm_with_gradients(tensor: int) -> list[torch.Tensor]:
    """This rank's heads of output, input gradient [5, 3, n, d] and weight gradient [n * d], fp32."""
    mesh = start_mesh(tensor)
    draw = torch.Generator().manual_seed(0)
    x, grad = torch.randn(5, 3, HEADS, SIZE, generator=draw), torch.randn(5, 3, HEADS, SIZE, generator=draw)
    weight = 1 + 0.2 * torch.randn(HEADS, SIZE, generator=draw)
    norm = ProjectionRMSNorm(SIZE, SimpleNamespace(params_dtype=torch.float32), 1e-6, heads=HEADS)
    norm.weight.data.copy_(weight.chunk(tensor)[mesh.tensor_rank].flatten())
    mine = x.chunk(tensor, 2)[mesh.tensor_rank].contiguous().requires_grad_()
    y = norm(mine)
    y.backward(grad.chunk(tensor, 2)[mesh.tensor_rank])
    assert mine.grad is not None and norm.weight.grad is not None
    return [y.detach(), mine.grad, norm.weight.grad]
