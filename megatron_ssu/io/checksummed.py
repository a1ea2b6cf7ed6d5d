"""Small files of ours: safetensors with one JSON header, sealed by digests so that damage is noticed.

The header lies under one metadata key (safetensors writes several in random order) as sorted compact JSON, so equal
content gives equal bytes. It holds the sha256 of every tensor, and its own: reading a tensor alone checks that tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from megatron_ssu.errors import UserError
from megatron_ssu.io.atomic import written_aside

HEADER_KEY = "megatron_ssu"
_TYPES = {np.dtype(f"<u{width}"): f"U{8 * width}" for width in (1, 2, 4, 8)}  # numpy's and safetensors' names
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
    _check_place(path, overwrite)
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


@dataclass(frozen=True)
class Streamed:
    """A tensor of unsigned integers that need not fit in memory: `parts` gives its numbers in order, again at every call."""

    dtype: np.dtype
    shape: tuple[int, ...]
    digest: str
    parts: Callable[[], Iterable[np.ndarray]]

    @classmethod
    def of(cls, tensor: np.ndarray) -> Streamed:
        return cls(tensor.dtype, tensor.shape, _tensor_digest(tensor), lambda: [tensor])

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_streamed(path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Streamed]) -> None:
    """As `write_sealed`, part by part."""
    path = Path(path)
    _check_place(path)
    sealed: dict[str, Any] = {**header, _DIGESTS: {name: tensors[name].digest for name in sorted(tensors)}}
    sealed[_SEAL] = _header_digest(sealed)
    entries: dict[str, Any] = {"__metadata__": {HEADER_KEY: _dumps(sealed)}}
    order, end = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)), 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        entries[name] = {"dtype": _TYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    try:
        with written_aside(path) as part, part.open("wb") as stream:
            stream.write(len(head).to_bytes(8, "little") + head)
            for name in order:
                for numbers in tensors[name].parts():
                    stream.write(np.ascontiguousarray(numbers).reshape(-1).view(np.uint8).data)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from error


def sealed_format(path: str | Path) -> str | None:
    """The format that a sealed file says it has; None where it is none, or cannot be read."""
    try:
        with safe_open(path, framework="numpy") as file:
            return str(json.loads((file.metadata() or {})[HEADER_KEY])["format"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


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


def _check_place(path: Path, overwrite: bool = False) -> None:
    if path.exists() and not overwrite:
        raise UserError(f"{path}: already exists; remove it or choose another name")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such directory; make it first")


def begin_digest(dtype: np.dtype, shape: tuple[int, ...]) -> Any:
    """What the digest of a tensor begins with; its bytes in order follow."""
    return hashlib.sha256(f"{dtype.str}{shape}".encode())


def _tensor_digest(tensor: np.ndarray) -> str:
    tensor = np.ascontiguousarray(tensor)
    digest = begin_digest(tensor.dtype, tensor.shape)
    digest.update(tensor.reshape(-1).view(np.uint8).data)
    return str(digest.hexdigest())
