"""Standard output and error of a process whose exit status must be right though nobody can read what it says."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any


class LossyOutput:
    """Standard output as rich's Console takes it. The first text that cannot be written (a full disk, a closed pipe) and all
    that follows are dropped; `lost` says why, where it was not the reader who closed the pipe."""

    def __init__(self) -> None:
        self._stream = sys.stdout  # while rich shows a bar sys.stdout is rich's own
        self.lost = ""

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if not isinstance(error, BrokenPipeError):
            self.lost = self.lost or error.strerror or str(error)
        _drop(self._stream)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        return self._stream.encoding


def open_closed_streams() -> None:
    """Let standard output and error that the process was started without go nowhere; Python has None for them."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the process's life


def print_error(line: str) -> None:
    """Print to standard error, or nowhere where that cannot be written."""
    with suppress(OSError, ValueError):  # ValueError: closed in Python
        print(line, file=sys.stderr)
    _flush(sys.stderr)


def settle() -> None:
    """Before the process ends: what cannot be flushed is dropped; Python would make the exit status 120 of it."""
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)


def _flush(stream: Any) -> None:
    with suppress(ValueError):
        try:
            stream.flush()
        except OSError:
            _drop(stream)


def _drop(stream: Any) -> None:
    """Let all that a stream holds, and gets from now on, go nowhere."""
    with suppress(OSError, ValueError):
        number = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)
        stream.flush()
