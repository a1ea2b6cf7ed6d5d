"""Calibration data: samples of chats or text, tokenized and packed into rows."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_ssu.data.chat import encode_chat
from megatron_ssu.data.jsonl import BadLine, LineReader, parse_object
from megatron_ssu.data.tokenizer import Tokenizer
from megatron_ssu.errors import UserError


@dataclass(frozen=True)
class Calibration:
    """Packed calibration tokens, `n` rows of length `s`."""

    tokens: Tensor  # int64 [n, s]
    mask: Tensor  # bool [n, s], True where a real token is
    digest: str  # sha256 over shape, tokens and mask
    n_samples: int  # samples in it
    note: str | None  # one line when there were fewer samples than asked for


def load_calibration(
    paths: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    samples: int,
    sequence_length: int,
    seed: int,
) -> Calibration:
    """Draw `samples` lines by `seed`, render, tokenize and pack them in the files' order.

    A line holds `messages` (role, content), `conversations` (from, value), `instruction`/`input`/`output`, or `text`,
    which is taken as it stands. The rows are the concatenated samples cut every `sequence_length` tokens.
    Raises UserError: no samples, a bad line, a sample that the template cannot render (file and line named).
    """
    files = [Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)]
    for key, value in (("samples", samples), ("sequence_length", sequence_length)):
        if value < 1:
            raise UserError(f"shield.calibration.{key}: {value}; at least 1 is needed")
    names = ", ".join(map(str, files))
    available = sum(1 for file in files for _ in LineReader(file))
    if available == 0:
        raise UserError(f"{names or 'shield.calibration.path'}: no calibration samples in it")
    chosen = sorted(random.Random(seed).sample(range(available), min(samples, available)))
    streams = [_sample_ids(file, number, line, tokenizer) for file, number, line in _pick(files, chosen)]
    note = None
    if available < samples:
        note = f"{names}: {available} calibration samples there, {samples} asked for; all {available} are used"
    return _pack(streams, sequence_length, tokenizer.eos_id or 0, note)


def _pick(files: list[Path], chosen: list[int]) -> Iterator[tuple[Path, int, bytes]]:
    """The lines whose running number over all files is in `chosen` (sorted), as (file, line number, line)."""
    wanted, index = set(chosen), 0
    for file in files:
        for number, line in LineReader(file):
            if index in wanted:
                yield file, number, line
            index += 1


def _sample_ids(file: Path, number: int, line: bytes, tokenizer: Tokenizer) -> list[int]:
    try:
        ids = encode_chat(parse_object(line), tokenizer)
    except BadLine as error:
        raise UserError(f"{file}:{number}: {error}") from error.__cause__
    if not ids:
        raise UserError(f"{file}:{number}: the sample is empty")
    return ids


def _pack(streams: list[list[int]], length: int, padding: int, note: str | None) -> Calibration:
    ids = np.concatenate([np.asarray(s, np.int64) for s in streams])
    rows = -(-len(ids) // length)
    missing = rows * length - len(ids)
    tokens = np.pad(ids, (0, missing), constant_values=padding).reshape(rows, length)
    mask = (np.arange(rows * length) < len(ids)).reshape(rows, length)
    digest = hashlib.sha256(f"calibration int64 bool {rows} {length}\n".encode())
    digest.update(tokens.astype("<i8").tobytes())
    digest.update(mask.astype(np.uint8).tobytes())
    return Calibration(
        tokens=torch.from_numpy(tokens),
        mask=torch.from_numpy(mask),
        digest=digest.hexdigest(),
        n_samples=len(streams),
        note=note,
    )
