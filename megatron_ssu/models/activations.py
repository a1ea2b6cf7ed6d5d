"""Activations that torch has no name for."""

from __future__ import annotations

import torch


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh approximation, transformers' gelu_pytorch_tanh."""
    return torch.nn.functional.gelu(x, approximate="tanh")
