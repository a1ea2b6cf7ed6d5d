"""Weights files as bytes: what they begin with, a digest of every bit, and files like them written anew."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from megatron_ssu.errors import UserError
from megatron_ssu.models.hf_files import EXPORT_RECORD, INDEX_FILE, HFCheckpoint, carried_files

CARD = "README.md"


def heads(checkpoint: HFCheckpoint) -> dict[str, bytes]:
    """What every weights file of a directory begins with: length and header, by the file's name."""
    found = {}
    for file in sorted({checkpoint.entry(name).file for name in checkpoint.names()}):
        with file.open("rb") as stream:
            length = stream.read(8)
            found[file.name] = length + stream.read(int.from_bytes(length, "little"))
    return found


def tensors_of(head: bytes) -> list[str]:
    """The tensors of a weights file in the order of their bytes."""
    entries = json.loads(head[8:])
    entries.pop("__metadata__", None)
    return sorted(entries, key=lambda name: entries[name]["data_offsets"])


def other_files(directory: Path) -> list[str]:
    """The files that belong to a model directory beside its weights files, sorted."""
    more = [name for name in (EXPORT_RECORD, INDEX_FILE, CARD) if (directory / name).is_file()]
    return sorted([str(name) for name in carried_files(directory)] + more)


def two_dimensional(raw: np.ndarray) -> np.ndarray:
    """A tensor's bits as [rows, width]."""
    return raw.reshape(raw.shape[0], -1)


class ModelDigest:
    """sha256 over names, dtypes, shapes and every byte of a model's tensors, however they are divided into files."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    def add(self, name: str, dtype: str, shape: tuple[int, ...], digest: str) -> None:
        """Of one tensor; `digest`: sha256 (hex) of its bytes."""
        self._lines[name] = f"{name}\0{dtype}\0{'x'.join(map(str, shape))}\0{digest}\n"

    def hexdigest(self) -> str:
        return hashlib.sha256("".join(line for _, line in sorted(self._lines.items())).encode()).hexdigest()


def write_directory(
    target: Path,
    heads: Mapping[str, bytes],
    parts_of: Callable[[str], Iterable[np.ndarray]],
    fill: Callable[[Path], None],
) -> None:
    """Write weights files that begin with `heads`, each followed by the bits of its tensors, and what `fill` adds.

    Everything is written into a folder beside `target` that takes its name when it is complete; where anything fails nothing is
    left. Raises UserError where it cannot be written.
    """
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file, head in heads.items():
            with (partial / file).open("wb") as stream:
                stream.write(head)
                for name in tensors_of(head):
                    for part in parts_of(name):
                        stream.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
                stream.flush()
                os.fsync(stream.fileno())
        fill(partial)
        if target.exists():
            target.rmdir()
        os.replace(partial, target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{target}: cannot be written: {error.strerror}; nothing was left behind") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
