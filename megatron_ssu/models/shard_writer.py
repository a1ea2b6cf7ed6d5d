"""One rank's safetensors files, written portion by portion by a thread of its own."""

from __future__ import annotations

import json
import os
import struct
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ssu.models.hf_import import DTYPE_NAMES
from megatron_ssu.models.matrix import Matrix


@dataclass(frozen=True)
class Tensor:
    """A tensor of the new checkpoint: its name, the matrices that are its rows, its stored dtype ('BF16', 'F32', ...)."""

    name: str
    matrices: tuple[Matrix, ...]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.matrices[0]
        return (sum(matrix.shape[0] for matrix in self.matrices), *first.shape[1:])

    @property
    def nbytes(self) -> int:
        return sum(matrix.elements for matrix in self.matrices) * DTYPE_NAMES[self.dtype].itemsize


def head_of(tensors: Sequence[Tensor]) -> bytes:
    """What a safetensors file of these tensors begins with: length and header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class ShardWriter:
    """Writes files one after the other, each to the disk. While it writes, the caller collects what comes next.

    The first failed write is kept in `error` and ends the writing: the other ranks still need the caller.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.error: OSError | None = None
        self._file: Any = None
        self._pool = ThreadPoolExecutor(1, "export")
        self._pending: deque[Future[None]] = deque()

    def begin(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Begin a file of these tensors."""
        self._submit(lambda: self._open(name, head_of(tensors)))

    def write(self, parts: Sequence[torch.Tensor]) -> None:
        """Append CPU tensors, which must not change any more. At most two calls' tensors are held."""
        self._submit(lambda: [self._file.write(p.contiguous().view(torch.uint8).numpy().data) for p in parts])

    def end(self) -> None:
        """End the file that was begun last."""
        self._submit(self._close)

    def finish(self) -> None:
        """Wait until everything is on the disk, or has failed."""
        while self._pending:
            self._pending.popleft().result()
        self._pool.shutdown()

    def _open(self, name: str, head: bytes) -> None:
        self._file = open(self.folder / name, "wb")  # noqa: SIM115
        self._file.write(head)

    def _close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _submit(self, work: Callable[[], object]) -> None:
        while len(self._pending) > 1:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._attempt, work))

    def _attempt(self, work: Callable[[], object]) -> None:
        if self.error is None:
            try:
                work()
            except OSError as error:
                self.error = error
