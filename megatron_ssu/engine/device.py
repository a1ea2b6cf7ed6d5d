"""The device of this rank."""

from __future__ import annotations

import torch


def has_cuda() -> bool:
    return torch.cuda.is_available()


def local_device() -> torch.device:
    """Where this rank's tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def device_name() -> str:
    """What the maker calls the GPU of this rank, or 'cpu'."""
    return torch.cuda.get_device_name() if has_cuda() else "cpu"
