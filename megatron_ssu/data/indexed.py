"""Indexed datasets on disk (PREFIX.bin, PREFIX.idx): naming, checking before use, reads that name what went wrong."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, get_bin_path

from megatron_ssu.config.sources import PLAIN, Reading
from megatron_ssu.data.rows import is_hub_id, is_table, rows_digest
from megatron_ssu.data.tokenizer import Tokenizer
from megatron_ssu.errors import UserError, one_line

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
_SUFFIXES = (".jsonl", ".json", ".gz", ".zst", ".parquet", ".arrow")
_FORMAT = 1  # of what `prepare` writes; part of the cached datasets' names
_TOKEN_TYPES = (np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64)


@dataclass(frozen=True)
class PrefixInfo:
    """What an indexed dataset holds."""

    prefix: Path
    dtype: type  # numpy type of a token
    sequences: int
    documents: int
    tokens: int
    index_digest: str  # sha256 of the .idx file
    lengths: np.ndarray  # int32 [sequences], in tokens
    masked: bool  # whether a byte per token says where there is loss (PREFIX.loss)


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def meta_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.json")


def loss_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.loss")


def source_kind(path: str | Path) -> Literal["jsonl", "table", "indexed"]:
    """Whether `path` is a JSONL file, another source with rows, or an indexed dataset's prefix. Raises UserError for none."""
    if is_table(path) or is_hub_id(path):
        return "table"
    if idx_path(path).exists() or bin_path(path).exists():
        return "indexed"
    if Path(path).is_file():
        if Path(path).suffix in (".bin", ".idx"):
            raise UserError(f"{path}: name an indexed dataset by its prefix, without {Path(path).suffix}")
        return "jsonl"
    raise UserError(
        f"{path}: neither a JSONL file, a table nor the prefix of an indexed dataset ({path}.bin, {path}.idx)"
    )


def prepared_prefix(
    run_data_dir: Path,
    source_path: str | Path,
    tokenizer_digest: str,
    reading: Reading = PLAIN,
    chat_template: str | dict[str, str] | None = None,
    marks: Sequence[int] = (),
) -> Path:
    """The prefix under which a run keeps the tokenized `source_path`.

    The same for every command that asks: the source's stem and a digest of its content, tokenizer, chat template, how it is
    read, and the tokenizer's `marks`.
    Raises UserError when the source cannot be read.
    """
    name = Path(source_path).name
    while Path(name).suffix in _SUFFIXES:
        name = Path(name).stem
    parts = [_FORMAT, rows_digest(source_path, reading), tokenizer_digest, reading.text_key, chat_template]
    parts += [list(marks)] if marks else []
    key = json.dumps([*parts, reading.choices()] if reading.choices() else parts, sort_keys=True)
    return Path(run_data_dir) / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def check_prefix(prefix: str | Path, *, tokenizer: Tokenizer | None = None) -> PrefixInfo:
    """Look an indexed dataset over before it is used: both files, header, sizes and offsets.

    With `tokenizer` the note beside it (PREFIX.json, if there) must name the same tokenizer and document end.
    Raises UserError naming the file and the offset of what is wrong.
    """
    index, data = idx_path(prefix), bin_path(prefix)
    for file in (index, data):
        if not file.is_file():
            raise UserError(f"{file}: missing; an indexed dataset is a pair of .bin and .idx, as `prepare` writes them")
    try:
        raw = index.read_bytes()
        data_bytes = data.stat().st_size
        with open(data, "rb"):
            pass
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
    dtype, lengths, pointers, documents = _parse_index(index, raw)
    _check_layout(index, dtype, lengths, pointers, documents)
    tokens = int(lengths.sum(dtype=np.int64))
    if tokens == 0:
        raise UserError(f"{index}: offset 18: no tokens in it")
    needed = tokens * DType.size(dtype)
    if data_bytes < needed:
        raise UserError(
            f"{data}: ends at offset {data_bytes}, but {index.name} lists {tokens} tokens = {needed} bytes; "
            "it was cut off, prepare it again"
        )
    if tokenizer is not None:
        _check_note(meta_path(prefix), tokenizer)
    digest = hashlib.sha256(raw).hexdigest()
    masked = _is_masked(prefix, tokens)
    return PrefixInfo(Path(prefix), dtype, len(lengths), len(documents) - 1, tokens, digest, lengths, masked)


def _is_masked(prefix: str | Path, tokens: int) -> bool:
    """Whether a mask is there, of the right size. Raises UserError where it is not and should be."""
    mask, choices = loss_path(prefix), _noted(meta_path(prefix), "reading", {})
    if not isinstance(choices, dict):
        raise UserError(f"{meta_path(prefix)}: not metadata that `prepare` wrote (reading)")
    if choices.get("loss_on", "all") == "all":
        return False
    size = mask.stat().st_size if mask.is_file() else None
    if size != tokens:
        what = "missing" if size is None else f"{size} bytes long"
        raise UserError(f"{mask}: {what}, and must have a byte for each of {tokens} tokens; prepare the text again")
    return True


def _parse_index(index: Path, raw: bytes) -> tuple[type, np.ndarray, np.ndarray, np.ndarray]:
    """Token type, sequence lengths int32 [n], byte offsets int64 [n], document boundaries int64 [d]."""
    if len(raw) < _HEADER.size:
        raise UserError(f"{index}: ends at offset {len(raw)}, within its header; it was cut off, prepare it again")
    magic, version, code, sequences, boundaries = _HEADER.unpack_from(raw)
    if magic != _MAGIC:
        raise UserError(f"{index}: offset 0: not the index of an indexed dataset")
    if version != 1:
        raise UserError(f"{index}: offset 9: version {version}, only 1 is known")
    try:
        dtype = DType.dtype_from_code(code)
    except ValueError:
        dtype = None
    if dtype not in _TOKEN_TYPES:
        raise UserError(f"{index}: offset 17: token type {code} must be an integer type")
    expected = _HEADER.size + 12 * sequences + 8 * boundaries
    if len(raw) not in (expected, expected + sequences):  # the latter with a byte of mode per sequence
        raise UserError(f"{index}: {len(raw)} bytes long, its header asks for {expected}; cut off or altered")
    lengths = np.frombuffer(raw, np.int32, sequences, _HEADER.size)
    pointers = np.frombuffer(raw, np.int64, sequences, _HEADER.size + 4 * sequences)
    documents = np.frombuffer(raw, np.int64, boundaries, _HEADER.size + 12 * sequences)
    return dtype, lengths, pointers, documents


def _check_layout(index: Path, dtype: type, lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray) -> None:
    n = len(lengths)
    if (negative := np.flatnonzero(lengths < 0)).size:
        at = int(negative[0])
        raise UserError(f"{index}: offset {_HEADER.size + 4 * at}: sequence {at} has length {lengths[at]}")
    ends = np.cumsum(lengths, dtype=np.int64) * DType.size(dtype)
    starts = np.concatenate(([0], ends[:-1])) if n else ends
    if (wrong := np.flatnonzero(pointers != starts)).size:
        at = int(wrong[0])
        where = _HEADER.size + 4 * n + 8 * at
        raise UserError(f"{index}: offset {where}: sequence {at} starts at byte {pointers[at]}, not at {starts[at]}")
    if not len(documents) or documents[0] != 0 or documents[-1] != n or (np.diff(documents) < 0).any():
        raise UserError(f"{index}: offset {_HEADER.size + 12 * n}: document boundaries do not span its {n} sequences")


def content_digest(prefix: str | Path) -> str:
    """Changes when an indexed dataset's content does: sha256 of its index, and of its sources and documents' ends as
    `prepare` noted them.

    Raises UserError like `check_prefix`.
    """
    index, note = check_prefix(prefix).index_digest, meta_path(prefix)
    try:
        sources = [str(source["sha256"]) for source in _noted(note, "sources") or []]
        begin, end = (_noted(note, key, None) for key in ("document_begin", "document_end"))
        eos = _noted(note, "eos", _ABSENT)  # null for a tokenizer without eos_token
        if begin or (eos is not _ABSENT and end != eos):  # other plain documents begin with nothing and end with eos
            sources.append(json.dumps([begin, end]))
        if choices := _noted(note, "reading", None):
            sources.append(json.dumps(choices, sort_keys=True))
    except (KeyError, TypeError) as error:
        raise UserError(f"{note}: not metadata that `prepare` wrote ({one_line(error)})") from error
    return hashlib.sha256(json.dumps([index, *sources]).encode()).hexdigest()


_REQUIRED = object()
_ABSENT = object()


def _noted(note: Path, key: str, default: Any = _REQUIRED) -> Any:
    """What the note beside an indexed dataset says; `default` (else None) where there is none, as another tool made it."""
    if not note.is_file():
        return None if default is _REQUIRED else default
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        return found[key] if default is _REQUIRED else found.get(key, default)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{note}: not metadata that `prepare` wrote ({one_line(error)})") from error


def _check_note(note: Path, tokenizer: Tokenizer) -> None:
    made_with = _noted(note, "tokenizer")
    if made_with is None or made_with == tokenizer.digest:
        return
    end = _noted(note, "document_end", None)
    if made_with == tokenizer.digest_ending(end):
        raise UserError(
            f"{note}: data.document_end: its documents end with {tokenizer.token_name(end)!r}, those of this run with "
            f"{tokenizer.token_name(tokenizer.document_end)!r}; set the key to the former, or prepare the text again"
        )
    raise UserError(
        f"{note}: tokenized with another tokenizer ({str(made_with)[:12]}) than the model's "
        f"({tokenizer.digest[:12]}); prepare the text again with this model"
    )


class CheckedReader:
    """Reads tokens from a .bin file with pread, so that a file that fails or shrinks under a run is an error by name.

    (A memory map would end the process with SIGBUS.) Ids at or above `vocab_size` are refused: they would index past
    the embedding.
    """

    def __init__(self, path: str | Path, vocab_size: int) -> None:
        self._path, self._vocab_size = Path(path), vocab_size
        try:
            self._fd = os.open(self._path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read ({error.strerror})") from error

    def read(self, dtype: type, count: int, offset: int) -> np.ndarray:
        """`count` tokens of numpy type `dtype` from byte `offset` on. Raises UserError naming file and offset."""
        offset, wanted = int(offset), int(count) * DType.size(dtype)
        buffer = bytearray()
        while len(buffer) < wanted:
            try:
                part = os.pread(self._fd, wanted - len(buffer), offset + len(buffer))
            except OSError as error:
                where = offset + len(buffer)
                raise UserError(f"{self._path}: offset {where}: cannot be read ({error.strerror})") from error
            if not part:
                where = offset + len(buffer)
                raise UserError(f"{self._path}: ends at offset {where}, {wanted - len(buffer)} bytes too early")
            buffer += part
        tokens: np.ndarray = np.frombuffer(buffer, dtype)
        if len(tokens) and (tokens.max() >= self._vocab_size or tokens.min() < 0):
            bad = np.flatnonzero((tokens < 0) | (tokens >= self._vocab_size))
            where, token = offset + int(bad[0]) * DType.size(dtype), int(tokens[bad[0]])
            raise UserError(
                f"{self._path}: offset {where}: token {token} is outside the vocabulary of {self._vocab_size}; "
                "damaged, or made with another tokenizer"
            )
        return tokens

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)


class MaskReader:
    """The masks of an indexed dataset's documents, read as their tokens are."""

    def __init__(self, info: PrefixInfo) -> None:
        self._info = info
        self._starts = np.cumsum(info.lengths, dtype=np.int64) - info.lengths
        self._open()

    def _open(self) -> None:
        self._reader = CheckedReader(loss_path(self._info.prefix), 2)

    def get(self, document: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """uint8 [length]: 1 where there is loss, from token `offset` of a document on."""
        count = int(self._info.lengths[document]) - offset if length is None else int(length)
        return self._reader.read(np.uint8, count, int(self._starts[document]) + int(offset))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_reader"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


class CheckedIndexedDataset(IndexedDataset):
    """megatron's IndexedDataset with a `CheckedReader`."""

    def __init__(self, prefix: str, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        super().__init__(prefix, multimodal=False, mmap=True)

    def initialize(self, path_prefix: str, *args: Any, **kwargs: Any) -> None:
        super().initialize(path_prefix, *args, **kwargs)
        self.bin_reader = CheckedReader(get_bin_path(path_prefix), self._vocab_size)

    def __getstate__(self) -> Any:
        return self._vocab_size, super().__getstate__()

    def __setstate__(self, state: Any) -> None:
        self._vocab_size, inner = state
        super().__setstate__(inner)
