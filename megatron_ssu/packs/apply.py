"""Packs put on a model and taken off: directories written anew, a few rows at a time, every bit checked on the way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ssu import __version__
from megatron_ssu.errors import UserError
from megatron_ssu.io.atomic import check_target
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.hf_config import difference
from megatron_ssu.models.hf_files import EXPORT_RECORD, HFCheckpoint
from megatron_ssu.packs.weights import CARD, ModelDigest, heads, other_files, two_dimensional, write_directory
from megatron_ssu.shield.pack_file import Pack, Side, row_chunks, shared_elements

_RECORD_FORMAT = "megatron-ssu stack 1"


def apply(source_dir: str | Path, pack: Pack, target: str | Path) -> None:
    """Write the adapted directory, every file as it was, from the source and the pack.

    Raises UserError, and writes nothing, where the directory is not the pack's source or the file is damaged.
    """
    path = check_target(target, "--output")
    found = model_fingerprint(source_dir, "apply")
    if found == pack.ends["result"].fingerprint:
        raise UserError(f"{source_dir}: has {pack.path} in it already")
    _check_source(source_dir, found, pack)
    _rewrite_side(HFCheckpoint(source_dir), pack, "source", path)


def remove(directory: str | Path, pack: Pack, target: str | Path) -> bool:
    """Write what a model was before `pack`: the pack's source, every file as it was, where nothing else is in it.

    Returns whether that is so; else (other packs are in it) its other weights and files stay as they are. Raises UserError, and
    writes nothing, where the pack is not in the model or the file is damaged.
    """
    path = check_target(target, "--output")
    checkpoint, found = HFCheckpoint(directory), model_fingerprint(directory, "remove")
    if found == pack.ends["source"].fingerprint:
        raise UserError(f"{directory}: is the model that {pack.path} was made from; there is nothing to remove")
    if found == pack.ends["result"].fingerprint:
        _rewrite_side(checkpoint, pack, "result", path)
        return True
    record = _read_record(checkpoint.directory)
    left = [entry for entry in record.get("packs", []) if entry["digest"] != pack.digest]
    rewriting = _Rewriting(checkpoint, [pack], "result")

    def fill(folder: Path) -> None:
        _carry(checkpoint.directory, folder, {}, drop=[EXPORT_RECORD])
        if left:
            _write_record(folder, record | {"packs": left})

    write_directory(path, heads(checkpoint), rewriting.parts, fill)
    return rewriting.digests[1].hexdigest() == pack.ends["source"].digest


def stack(source_dir: str | Path, packs: Sequence[Pack], target: str | Path) -> None:
    """Write the source with all `packs`, which must be of that source and have no element in common.

    Raises UserError, and writes nothing, where they do, or a pack is not of that source, or damaged.
    """
    path = check_target(target, "--output")
    check_stackable(packs)
    found = model_fingerprint(source_dir, "--source")
    for pack in packs:
        _check_source(source_dir, found, pack)
    changes = _common_files(packs)
    checkpoint = HFCheckpoint(source_dir)
    rewriting = _Rewriting(checkpoint, packs, "source")
    entries = [{"name": pack.ends["result"].name, "digest": pack.digest} for pack in packs]
    record = {"source": packs[0].ends["source"].name, "source_digest": packs[0].ends["source"].digest, "packs": entries}

    def fill(folder: Path) -> None:
        for pack in packs:
            rewriting.check_whole(pack)
        _carry(checkpoint.directory, folder, changes, drop=[EXPORT_RECORD])
        _write_record(folder, record)

    write_directory(path, heads(checkpoint), rewriting.parts, fill)


def check_stackable(packs: Sequence[Pack]) -> None:
    """Raises UserError unless the packs are of one source and move no element in common, naming those that do not fit."""
    first = packs[0]
    for pack in packs[1:]:
        if pack.ends["source"].digest != first.ends["source"].digest:
            raise UserError(
                f"{pack.path}: made from another model ({pack.ends['source'].name}) than {first.path} "
                f"({first.ends['source'].name}); packs that are stacked must come from one source"
            )
    for one, other in combinations(packs, 2):
        if one.digest == other.digest:
            raise UserError(f"{other.path}: the same pack as {one.path}; name each once")
        shared = shared_elements(one, other)
        if shared:
            name = min(shared)
            raise UserError(
                f"{other.path}: moves {sum(shared.values()):,} weights that {one.path} moves too, in {len(shared)} tensors, "
                f"such as {name}; train it with shield.reserve: [{one.path}]"
            )


class _Rewriting:
    """The tensors of a model with packs put on (`side` is source: what is there) or taken off (result)."""

    def __init__(self, checkpoint: HFCheckpoint, packs: Sequence[Pack], side: Side) -> None:
        self._checkpoint, self._packs, self._side = checkpoint, packs, side
        self.digests = (ModelDigest(), ModelDigest())  # of what is read and what is written
        names = set(checkpoint.names())
        for pack in packs:
            for name, moved in pack.moved.items():
                if name not in names or checkpoint.shape(name) != moved.shape or checkpoint.dtype(name) != moved.dtype:
                    raise UserError(
                        f"{checkpoint.directory}: must have a tensor {name} of {moved.dtype} {list(moved.shape)} for "
                        f"{pack.path}; name a directory of the same model"
                    )

    def parts(self, name: str) -> Iterator[np.ndarray]:
        """Its new bits, some rows at a time. Raises UserError at the end of a tensor that is not as a pack needs it."""
        entry, raw = self._checkpoint.entry(name), two_dimensional(self._checkpoint.raw(name))
        changes = [
            (pack, pack.change(name), hashlib.sha256(), hashlib.sha256()) for pack in self._packs if name in pack.moved
        ]
        read, written = hashlib.sha256(), hashlib.sha256()
        for rows in row_chunks(entry.shape or (1,)):
            part = np.array(raw[rows])
            read.update(part.reshape(-1).view(np.uint8).data)
            for _, change, before, after in changes:
                at = change.place.of(rows)
                old = np.ascontiguousarray(part[at]).reshape(-1)
                new = old ^ change.next(old.size)
                before.update(old.view(np.uint8).data)
                after.update(new.view(np.uint8).data)
                part[at] = new.reshape(part[at].shape)
            written.update(part.reshape(-1).view(np.uint8).data)
            yield part
        for pack, _, before, after in changes:
            self._check(pack, name, before.hexdigest(), after.hexdigest())
        for digest, found in zip(self.digests, (read, written), strict=True):
            digest.add(name, entry.dtype, entry.shape, found.hexdigest())

    def _check(self, pack: Pack, name: str, before: str, after: str) -> None:
        moved = pack.moved[name]
        ends = (moved.source, moved.result) if self._side == "source" else (moved.result, moved.source)
        if before != ends[0]:
            what = "made from other weights" if self._side == "source" else "not in it as it is"
            raise UserError(
                f"{self._checkpoint.directory}: {pack.path} was {what}: {name} differs; nothing was written"
            )
        if after != ends[1]:
            raise UserError(f"{pack.path}: the pack file is damaged at {name}; make it again")

    def check_whole(self, pack: Pack) -> None:
        """Raises UserError unless every bit that was read is as it was on this side of the pack."""
        if self.digests[0].hexdigest() != pack.ends[self._side].digest:
            raise UserError(
                f"{self._checkpoint.directory}: differs from the model that {pack.path} was made with, in weights that the "
                "pack leaves alone; nothing was written"
            )


def _rewrite_side(checkpoint: HFCheckpoint, pack: Pack, side: Side, target: Path) -> None:
    """Write the directory at the other end of the pack."""
    other: Side = "result" if side == "source" else "source"
    rewriting = _Rewriting(checkpoint, [pack], side)

    def fill(folder: Path) -> None:
        rewriting.check_whole(pack)
        if rewriting.digests[1].hexdigest() != pack.ends[other].digest:
            raise UserError(f"{pack.path}: the pack file is damaged; make it again")
        _carry(checkpoint.directory, folder, pack.files(other), drop=pack.ends[side].files)

    write_directory(target, {f: pack.head(other, f) for f in pack.ends[other].heads}, rewriting.parts, fill)


def _check_source(directory: str | Path, found: str, pack: Pack) -> None:
    end = pack.ends["source"]
    if found != end.fingerprint:
        raise UserError(
            f"{directory}: is not the model that {pack.path} was made from ({end.name}): other "
            f"{difference(end.fingerprint, found)}"
        )


def _common_files(packs: Sequence[Pack]) -> dict[str, bytes]:
    """What the packs change beside the weights. Raises UserError where two change a file differently."""
    found: dict[str, tuple[Pack, bytes]] = {}
    for pack in packs:
        for name, content in pack.files("result").items():
            if name in (EXPORT_RECORD, CARD) or name.endswith(".index.json"):
                continue
            before = found.setdefault(name, (pack, content))
            if before[1] != content:
                raise UserError(
                    f"{pack.path}: has another {name} than {before[0].path}; packs that are stacked must agree"
                )
    return {name: content for name, (_, content) in found.items()}


def _carry(directory: Path, folder: Path, files: Mapping[str, bytes], drop: Sequence[str]) -> None:
    """Copy the files beside the weights, but for `drop`, and write `files`."""
    contents = {n: (directory / n).read_bytes() for n in other_files(directory) if n not in drop} | dict(files)
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _read_record(directory: Path) -> dict[str, Any]:
    """What a stack says of itself; nothing where the directory has no such record."""
    try:
        record = json.loads((directory / EXPORT_RECORD).read_text(encoding="utf-8"))
        return record if record["format"] == _RECORD_FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write_record(folder: Path, values: dict[str, Any]) -> None:
    record = {"format": _RECORD_FORMAT, "version": __version__} | values
    (folder / EXPORT_RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
