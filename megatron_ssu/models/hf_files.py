"""Reading the safetensors files of a Hugging Face directory, sharded or not, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from megatron_ssu.errors import UserError
from megatron_ssu.models.hub import local_directory

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
EXPORT_RECORD = "megatron-ssu.json"  # what an export of this project says of itself
# What belongs to a model beside its weights: config, tokenizer with its code, chat templates, generation config.
_CARRIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "additional_chat_templates/*.jinja")
# Width in bytes of one number, by safetensors' own dtype names.
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_MAX_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor's bytes lie."""

    file: Path
    dtype: str  # safetensors' name: BF16, F32, ...
    shape: tuple[int, ...]
    start: int  # offset in the file
    nbytes: int


def carried_files(directory: Path) -> list[Path]:
    """The files beside the weights that every copy of a model needs, relative to `directory`, sorted."""
    found = {file for pattern in _CARRIED for file in directory.glob(pattern) if file.is_file()}
    return sorted(
        file.relative_to(directory)
        for file in found
        if file.name != EXPORT_RECORD and not file.name.endswith(".index.json")
    )


def carry_files(source: Path, target: Path) -> None:
    """Copy them. Raises OSError."""
    for name in carried_files(source):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)


def row_window(name: str) -> tuple[str, slice | None]:
    """A matrix's name as the tensor that it is stored in and its rows there; None: all of them."""
    tensor, _, rows = name.partition("[")
    if not rows:
        return name, None
    first, _, stop = rows.removesuffix("]").partition(":")
    return tensor, slice(int(first), int(stop))


@dataclass(frozen=True)
class _Rows:
    """A safetensors slice object whose rows are counted from `first`."""

    whole: Any
    first: int

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        rows, *others = index
        return self.whole[(slice(self.first + rows.start, self.first + rows.stop), *others)]


class HFCheckpoint:
    """The tensors of a Hugging Face directory; only headers are read until a tensor is asked for.

    `model.safetensors` is taken before an index, as transformers does.
    """

    def __init__(self, hf_dir: str | Path, *, weights: bool = True) -> None:
        """Without `weights` it has no tensors, whatever is in the directory.

        Raises UserError when the directory, a shard or the index is missing or broken, or a shard lacks a tensor that the
        index puts there.
        """
        self.directory = local_directory(hf_dir)
        self._tensors = _entries(self.directory) if weights else {}
        self._open: dict[Path, Any] = {}

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and row_window(name)[0] in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._tensors)

    def parts(self, matrices: Iterable[str]) -> list[str]:
        """All tensor names, sorted, where tensors that `matrices` names rows of are cut into these rows and what is between."""
        cuts: dict[str, set[int]] = {}
        for tensor, rows in map(row_window, matrices):
            if rows is not None and tensor in self._tensors:
                cuts.setdefault(tensor, {0, self._tensors[tensor].shape[0]}).update((rows.start, rows.stop))
        found = []
        for name in self.names():
            edges = sorted(cuts.get(name, ()))
            found += [f"{name}[{a}:{b}]" for a, b in pairwise(edges)] or [name]
        return found

    def entry(self, name: str) -> TensorEntry:
        """File, dtype, shape and offset of a tensor, or of rows of it (`NAME[0:64]`). UserError when there is none."""
        tensor, rows = row_window(name)
        try:
            entry = self._tensors[tensor]
        except KeyError:
            raise UserError(
                f"{self.directory}: has no tensor {tensor}; is it a checkpoint of the same model?"
            ) from None
        if rows is None:
            return entry
        first, stop = rows.start, min(rows.stop, entry.shape[0])
        bytes_of_row = entry.nbytes // max(1, entry.shape[0])
        return replace(
            entry,
            shape=(max(0, stop - first), *entry.shape[1:]),
            start=entry.start + first * bytes_of_row,
            nbytes=max(0, stop - first) * bytes_of_row,
        )

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def dtype(self, name: str) -> str:
        """safetensors' dtype name: BF16, F32, ..."""
        return self.entry(name).dtype

    def get_slice(self, name: str) -> Any:
        """A safetensors slice object: index it to read a part, as a torch tensor on the CPU."""
        tensor, rows = row_window(name)
        whole = self._handle(self.entry(tensor).file).get_slice(tensor)
        return whole if rows is None else _Rows(whole, rows.start)

    def get(self, name: str) -> torch.Tensor:
        """The whole tensor, in the file's dtype, on the CPU."""
        tensor, rows = row_window(name)
        handle = self._handle(self.entry(tensor).file)
        return handle.get_tensor(tensor) if rows is None else handle.get_slice(tensor)[rows]

    def raw(self, name: str) -> np.ndarray:
        """The bits of a tensor as unsigned integers [shape] of its width: a read-only memory map, not read yet."""
        entry = self.entry(name)
        width = ITEM_BYTES.get(entry.dtype)
        if width is None:
            raise UserError(f"{entry.file}: {name} has dtype {entry.dtype}, which cannot be compared bit by bit")
        if entry.nbytes == 0:
            return np.zeros(entry.shape, dtype=f"<u{width}")
        return np.memmap(entry.file, dtype=f"<u{width}", mode="r", offset=entry.start, shape=entry.shape or (1,))

    def close(self) -> None:
        """Let go of the open files."""
        self._open.clear()

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: not a readable safetensors file ({error}); fetch it again") from error
        return self._open[file]


def _entries(directory: Path) -> dict[str, TensorEntry]:
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; a Hugging Face model directory is needed")
    single = directory / SINGLE_FILE
    if single.is_file():
        return read_header(single)
    index = directory / INDEX_FILE
    if not index.is_file():
        raise UserError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE} is in it; weights must be safetensors")
    weight_map = _read_index(index)
    headers: dict[str, dict[str, TensorEntry]] = {}
    for file in sorted(set(weight_map.values())):
        if not (directory / file).is_file():
            raise UserError(f"{directory / file}: missing, though {INDEX_FILE} names it; fetch the model again")
        headers[file] = read_header(directory / file)
    result = {}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise UserError(f"{directory / file}: has no tensor {name}, though {INDEX_FILE} puts it there")
        result[name] = headers[file][name]
    return result


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{index}: broken index ({type(error).__name__}: {error}); fetch it again") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: broken index: 'weight_map' must map tensor names to files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
            raise UserError(f"{index}: broken index: {name} must lie in a file of this directory, not {file!r}")
    return weight_map


def read_header(file: str | Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, from its header; UserError when it is not one or is cut short."""
    file = Path(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise UserError(f"{file}: truncated, or no safetensors file ({size} bytes); fetch it again")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        data = 8 + length
        entries, end = {}, 0
        for name, value in header.items():
            first, last = value["data_offsets"]
            entries[name] = TensorEntry(file, value["dtype"], tuple(value["shape"]), data + first, last - first)
            end = max(end, last)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{file}: no safetensors header ({type(error).__name__}: {error}); fetch it again") from error
    if size != data + end:
        raise UserError(
            f"{file}: truncated or damaged: {size} bytes where its header says {data + end}; fetch it again"
        )
    return entries
