"""What is done around the step of an optimizer that another loop calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def around_step(optimizer: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Let `optimizer.step()`, of this optimizer alone, call `before` and `after`; they come around hooks set before."""
    step = optimizer.step

    @functools.wraps(step)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        before()
        result = step(*args, **kwargs)
        after()
        return result

    optimizer.step = hooked
