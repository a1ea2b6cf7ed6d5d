"""Small files of ours: safetensors with one JSON header, sealed by digests so that damage is noticed.

The header lies under one metadata key (safetensors writes several in random order) as sorted compact JSON, so equal
content gives equal bytes. It holds the sha256 of every tensor, and its own: reading a tensor alone checks that tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from megatron_ssu.errors import UserError
from megatron_ssu.io.atomic import written_aside

HEADER_KEY = "megatron_ssu"
_DIGESTS = "tensors"
_SEAL = "sha256"


def seal(header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """`header` with the digest of every tensor (`tensors`) and of all of it (`sha256`)."""
    sealed = {**header, _DIGESTS: {name: _tensor_digest(tensors[name]) for name in sorted(tensors)}}
    sealed[_SEAL] = _header_digest(sealed)
    return sealed


def write_sealed(
    path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, np.ndarray], *, overwrite: bool = False
) -> None:
    """Write a sealed file under a temporary name and move it into place; UserError when `path` is taken."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path}: already exists; remove it or choose another name")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such directory; make it first")
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    sealed = _dumps(seal(header, tensors))
    try:
        with written_aside(path) as part:
            part.touch()
            mode = part.stat().st_mode  # what the umask gives; safetensors makes files that nobody else can read
            save_file(tensors, part, metadata={HEADER_KEY: sealed})
            part.chmod(mode)
    except (OSError, SafetensorError) as error:  # safetensors has a class of its own for a full disk
        raise UserError(f"{path}: cannot be written ({error})") from error


class SealedFile:
    """A sealed file, opened: the header checked, tensors read (and checked) one by one."""

    def __init__(self, path: str | Path, format: str, what: str) -> None:
        """`format`: what header['format'] must be; `what`: the word for such a file in messages."""
        self.path = Path(path)
        self.what = what
        if not self.path.is_file():
            raise UserError(f"{path}: no such {what} file")
        try:
            self._file = safe_open(self.path, framework="numpy")
            metadata = self._file.metadata() or {}
            keys = set(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a {what} file, or a truncated one ({error}); make it again") from error
        if HEADER_KEY not in metadata:
            raise UserError(f"{path}: not a {what} file: a safetensors file of another kind")
        try:
            self.header = json.loads(metadata[HEADER_KEY])
            found = self.header["format"]
            intact = self.header[_SEAL] == _header_digest(self.header) and keys == set(self.header[_DIGESTS])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: the {what} file's header is damaged ({error}); make it again") from error
        if found != format:
            raise UserError(f"{path}: not a {what} file of this version: its format is {found!r}, needed {format!r}")
        if not intact:
            raise UserError(
                f"{path}: the {what} file was altered: its header does not match its checksum; make it again"
            )

    @property
    def digest(self) -> str:
        """sha256 (hex) that stands for the whole content."""
        return self.header[_SEAL]

    def names(self) -> list[str]:
        return sorted(self.header[_DIGESTS])

    def get(self, name: str) -> np.ndarray:
        """One tensor; UserError when its bytes are not those that were written."""
        tensor = self._file.get_tensor(name)
        if _tensor_digest(tensor) != self.header[_DIGESTS][name]:
            raise UserError(f"{self.path}: the {self.what} file was altered or damaged at {name}; make it again")
        return tensor


def _dumps(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _header_digest(header: Mapping[str, Any]) -> str:
    return hashlib.sha256(_dumps({k: v for k, v in header.items() if k != _SEAL}).encode()).hexdigest()


def _tensor_digest(tensor: np.ndarray) -> str:
    tensor = np.ascontiguousarray(tensor)
    digest = hashlib.sha256(f"{tensor.dtype.str}{tensor.shape}".encode())
    digest.update(tensor.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
