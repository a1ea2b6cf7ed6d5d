"""Asked to stop: signals and the wall-clock budget. The step is finished, a checkpoint saved, the status says why.

    status   why
    75       SIGUSR1 or train.exit_after: start again to resume
    143      SIGTERM
    130      SIGINT

A rank only votes; the votes are summed with the step's loss, so that all ranks stop after the same step, whichever of them
was asked. Another SIGINT or SIGTERM, more than REPEAT seconds later, ends the process at once, without a checkpoint: what
comes sooner is the same request, sent to all processes of a job by SLURM and passed on by torchrun.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from megatron_ssu.errors import STATUS_RULE

REASONS = ("SIGTERM", "SIGINT", "SIGUSR1", "train.exit_after")
REPEAT = 5.0
STATUS = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 75, "train.exit_after": 75, "evaluate.stop_when": STATUS_RULE}


class StopRequests:
    """Context in which signals are votes to stop. In other threads than the main one only the budget is watched."""

    def __init__(self, exit_after: float | None = None, started: float | None = None) -> None:
        """`exit_after`: seconds from `started` (time.monotonic) on, None for no limit."""
        self._seen: set[str] = set()
        begin = time.monotonic() if started is None else started
        self._deadline = None if exit_after is None else begin + exit_after
        self._before: dict[int, Any] = {}
        self._first: dict[str, float] = {}

    def __enter__(self) -> StopRequests:
        for name in REASONS[:3]:
            number = getattr(signal, name)
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread
                break
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        self._seen.add(name)
        if name != "SIGUSR1" and now - self._first.setdefault(name, now) > REPEAT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def votes(self) -> list[float]:
        """One number for each of REASONS: has this rank been asked to stop for it?"""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._seen.add("train.exit_after")
        return [float(reason in self._seen) for reason in REASONS]


def verdict(votes: Sequence[float]) -> str | None:
    """The reason to stop that some rank voted for, or None; `votes` are summed over ranks."""
    return next((reason for reason, count in zip(REASONS, votes, strict=True) if count > 0), None)
