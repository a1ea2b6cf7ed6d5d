"""What this machine offers a run, asked without a CUDA context."""

from __future__ import annotations

from contextlib import suppress
from importlib import metadata

import torch


def cuda() -> bool:
    """Whether there is a GPU."""
    return torch.cuda.is_available()


def transformer_engine() -> bool:
    """Whether megatron-core will use Transformer Engine; an installed one that it cannot import does not count."""
    if not cuda():
        return False
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE


def flash_attention() -> bool:
    """Whether a flash-attention that Transformer Engine looks for is installed."""
    for name in ("flash-attn", "flash-attn-3", "flash-attn-4"):
        with suppress(metadata.PackageNotFoundError):
            metadata.version(name)
            return True
    return False
