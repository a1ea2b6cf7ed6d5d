"""Operations on many tensors at once."""

from __future__ import annotations

import torch


def scale_all(tensors: list[torch.Tensor], factor: float) -> None:
    """Multiply the tensors by `factor`, in place and in one pass."""
    torch._foreach_mul_(tensors, factor)
