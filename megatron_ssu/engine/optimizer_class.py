"""The class of megatron's distributed optimizer."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def distributed_optimizer_class(cls: type, **extra: Any) -> Iterator[None]:
    """While it lasts, `get_megatron_optimizer` builds `cls` (with `extra` arguments) for its DistributedOptimizer."""
    import megatron.core.optimizer as module

    stock = module.DistributedOptimizer
    module.DistributedOptimizer = functools.partial(cls, **extra)
    try:
        yield
    finally:
        module.DistributedOptimizer = stock
