"""Make a pack of a model and what it was adapted to. Both are read a few rows at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ssu.errors import UserError
from megatron_ssu.io.checksummed import Streamed, begin_digest, write_streamed
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.hf_files import HFCheckpoint
from megatron_ssu.models.hub import model_name
from megatron_ssu.packs.weights import ModelDigest, heads, other_files, two_dimensional
from megatron_ssu.shield.mask import GRANULARITIES, Mask
from megatron_ssu.shield.pack_file import FORMAT, End, Moved, Pack, Place, row_chunks
from megatron_ssu.shield.verify import check_tensors


def create(source_dir: str | Path, adapted_dir: str | Path, shield: str, target: Path) -> Pack:
    """Write the pack `target`.

    `shield`: digest of the shield that the adapted model was trained under, for the record. Raises UserError where the
    directories differ in tensors' names, dtypes or shapes, where nothing moved, or `target` is taken.
    """
    source, adapted = HFCheckpoint(source_dir), HFCheckpoint(adapted_dir)
    check_tensors(source, adapted)
    digests, moved, tensors = (ModelDigest(), ModelDigest()), {}, {}
    for name in source.names():
        pair = _Pair(name, source, adapted)
        frozen = pair.scan(digests)
        if frozen is not None:
            tensors[f"frozen/{name}"] = Streamed.of(frozen.packed)
            moved[name], tensors[f"xor/{name}"] = pair.change(frozen)
    if not moved:
        raise UserError(f"{adapted.directory}: every weight is as in {source.directory}; there is nothing to pack")
    files = _differing_files(source.directory, adapted.directory)
    header: dict[str, Any] = {"format": FORMAT, "shield": shield}
    for side, directory, checkpoint, digest in (
        ("source", source_dir, source, digests[0]),
        ("result", adapted_dir, adapted, digests[1]),
    ):
        begin = heads(checkpoint)
        own = tuple(n for n in files if (checkpoint.directory / n).is_file())
        end = End(model_name(directory), model_fingerprint(directory), digest.hexdigest(), tuple(begin), own)
        header[side] = asdict(end)
        tensors |= {f"head/{side}/{file}": _bytes(head) for file, head in begin.items()}
        tensors |= {f"file/{side}/{n}": _bytes((checkpoint.directory / n).read_bytes()) for n in own}
    header["moved"] = {name: asdict(entry) for name, entry in moved.items()}
    write_streamed(target, header, tensors)
    return Pack(target)


class _Pair:
    """One tensor of both models."""

    def __init__(self, name: str, source: HFCheckpoint, adapted: HFCheckpoint) -> None:
        self.name, self.entry = name, source.entry(name)
        self.shape = self.entry.shape or (1,)
        self._raws = [two_dimensional(checkpoint.raw(name)) for checkpoint in (source, adapted)]

    def scan(self, digests: tuple[ModelDigest, ModelDigest]) -> Mask | None:
        """Where nothing moved, by what takes least; None where nothing moved at all. Adds the tensor to both digests."""
        hashes = (hashlib.sha256(), hashlib.sha256())
        width = self._raws[0].shape[1]
        rows, columns, packed = np.zeros(self.shape[0], dtype=bool), np.zeros(width, dtype=bool), []
        for chunk in row_chunks(self.shape):
            before, after = (np.ascontiguousarray(raw[chunk]) for raw in self._raws)
            for digest, part in zip(hashes, (before, after), strict=True):
                digest.update(part.reshape(-1).view(np.uint8).data)
            differs = before != after
            rows[chunk] = differs.any(axis=1)
            columns |= differs.any(axis=0)
            packed.append(np.packbits(~differs.reshape(-1), bitorder="little"))
        for total, digest in zip(digests, hashes, strict=True):
            total.add(self.name, self.entry.dtype, self.entry.shape, digest.hexdigest())
        if not rows.any():
            return None
        masks = [Mask("element", self.shape, np.concatenate(packed))]
        if len(self.shape) == 2:
            masks += [Mask.of("column", self.shape, ~columns), Mask.of("row", self.shape, ~rows)]
        return min(masks, key=lambda m: (self._nbytes(m), GRANULARITIES.index(m.granularity)))

    def _nbytes(self, frozen: Mask) -> int:
        elements = int(np.prod(self.shape, dtype=np.int64)) - frozen.frozen_elements
        return elements * self._raws[0].itemsize + frozen.packed.nbytes

    def change(self, frozen: Mask) -> tuple[Moved, Streamed]:
        """The tensor's entry in the header, and its numbers."""
        elements = int(np.prod(self.shape, dtype=np.int64)) - frozen.frozen_elements
        dtype = np.dtype(self._raws[0].dtype)
        before, after, xor = hashlib.sha256(), hashlib.sha256(), begin_digest(dtype, (elements,))
        for a, b in self._moving(frozen):
            for digest, part in ((before, a), (after, b), (xor, a ^ b)):
                digest.update(part.view(np.uint8).data)
        moved = Moved(self.shape, self.entry.dtype, frozen.granularity, elements, before.hexdigest(), after.hexdigest())
        return moved, Streamed(dtype, (elements,), xor.hexdigest(), lambda: (a ^ b for a, b in self._moving(frozen)))

    def _moving(self, frozen: Mask) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Before and after of what moves, flat, some rows at a time."""
        place = Place(frozen)
        for rows in row_chunks(self.shape):
            a, b = (np.ascontiguousarray(raw[rows][place.of(rows)]).reshape(-1) for raw in self._raws)
            yield a, b


def _differing_files(source: Path, adapted: Path) -> list[str]:
    """Names of files beside the weights that are not the same in both, or only in one."""

    def content(directory: Path, name: str) -> bytes | None:
        return (directory / name).read_bytes() if (directory / name).is_file() else None

    names = sorted({*other_files(source), *other_files(adapted)})
    return [name for name in names if content(source, name) != content(adapted, name)]


def _bytes(content: bytes) -> Streamed:
    return Streamed.of(np.frombuffer(content, dtype=np.uint8))
