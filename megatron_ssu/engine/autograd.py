"""The autograd engine's seam for work at the end of a backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def after_backward(output: Tensor, work: Callable[[], None]) -> None:
    """Call `work` once when the backward pass that begins at, or goes through, `output` has ended."""

    def queue(gradient: Tensor) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(work)

    output.register_hook(queue)
