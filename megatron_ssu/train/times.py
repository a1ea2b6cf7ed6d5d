"""Where a run's time goes: seconds by what they went to (data, forward-backward, optimizer, evaluation, checkpoint).

A moment belongs to the innermost part that is open. On CUDA, where Python is ahead of the GPU, parts are bounded by
events in the stream: time is booked on the part whose kernels took it, and nothing is synchronised to measure it. A wait
for data that the GPU spends on earlier kernels so costs nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from megatron_ssu.engine.device import has_cuda


class Clock(Protocol):
    """Marks in time; `between` gives the seconds from one to a later one, or None where that has not been reached yet."""

    def mark(self) -> Any: ...

    def between(self, first: Any, second: Any) -> float | None: ...


class HostClock:
    def mark(self) -> float:
        return time.perf_counter()

    def between(self, first: float, second: float) -> float:
        return second - first


class StreamClock:
    """The current CUDA stream's time."""

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Any, second: Any) -> float | None:
        return first.elapsed_time(second) / 1e3 if second.query() else None


class Times:
    """`with times(name)` books the time within, less that of inner parts."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock: Clock = clock or (StreamClock() if has_cuda() else HostClock())
        self._open: list[tuple[str, Any]] = []  # parts around, each with the mark from which it is not booked yet
        self._spent: deque[tuple[str, Any, Any]] = deque()  # part and its two marks, not read yet

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = self._clock.mark()
        if self._open:
            outer, since = self._open[-1]
            self._spent.append((outer, since, begin))
        self._open.append((name, begin))
        try:
            yield
        finally:
            end = self._clock.mark()
            name, since = self._open.pop()
            self._spent.append((name, since, end))
            if self._open:
                self._open[-1] = (self._open[-1][0], end)

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call. What the GPU has not finished counts in a later one."""
        taken: dict[str, float] = {}
        while self._spent:
            name, first, second = self._spent[0]
            seconds = self._clock.between(first, second)
            if seconds is None:
                break
            taken[name] = taken.get(name, 0.0) + seconds
            self._spent.popleft()
        return taken
