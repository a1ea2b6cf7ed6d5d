"""Standard output and error of a process whose exit status must be right though nobody can read what it says."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any


class LossyOutput:
    """Standard output as rich's Console takes it. The first text that cannot be written (a full disk, a closed pipe) and all
    that follows are dropped."""

    def __init__(self) -> None:
        self._stream = sys.stdout  # while rich shows a bar sys.stdout is rich's own

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            _drop(self._stream)
        return len(text)

    def flush(self) -> None:
        _flush(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def print_error(line: str) -> None:
    """Print to standard error, or nowhere where that cannot be written."""
    with suppress(OSError):
        print(line, file=sys.stderr)
    _flush(sys.stderr)


def settle() -> None:
    """Before the process ends: what cannot be flushed is dropped; Python would make the exit status 120 of it."""
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)


def _flush(stream: Any) -> None:
    try:
        stream.flush()
    except OSError:
        _drop(stream)


def _drop(stream: Any) -> None:
    """Let all that a stream holds, and gets from now on, go nowhere."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()
