"""The rows of a source, whatever its format, as lines of JSON with their numbers: JSONL, Parquet, Arrow, Hugging Face datasets.

Values that are null in a table are left out of its rows: a table has every key in every row, and JSON lines only those that
say something.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from megatron_ssu.config.checks.files import SAVED_DATASET
from megatron_ssu.config.sources import PLAIN, Reading
from megatron_ssu.data.jsonl import LineReader, source_digest
from megatron_ssu.errors import UserError, named_line
from megatron_ssu.io.extras import require

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TABLES = (".parquet", ".arrow")
_BATCH = 1000  # rows


class Rows(Protocol):
    """Rows as (number from 1, line of JSON). `bytes_read` grows to `size_of` the source while they are read."""

    bytes_read: int

    def __iter__(self) -> Iterator[tuple[int, bytes]]: ...


def is_table(path: str | Path) -> bool:
    """Whether `path` is a Parquet or Arrow file, or a directory of such or of a saved dataset."""
    place = Path(path)
    if place.is_dir():
        return bool(_files(place)) or any((place / name).is_file() for name in SAVED_DATASET)
    return place.suffix in _TABLES


def is_hub_id(path: str | Path) -> bool:
    """Whether `path` can only be the name of a dataset on the Hugging Face hub."""
    return bool(HUB_ID.fullmatch(str(path))) and not Path(path).exists() and not Path(f"{path}.idx").exists()


def open_rows(path: str | Path, reading: Reading) -> Rows:
    """The rows of a source. Raises UserError, here or while they are read: no such file, split or library, damage."""
    if is_hub_id(path) or is_table(path):
        return TableReader(path, reading)
    return LineReader(path)


def size_of(path: str | Path) -> int:
    """Bytes on disk; 1 where the source is on the hub."""
    place = Path(path)
    if place.is_dir():
        return max(1, sum(file.stat().st_size for file in place.rglob("*") if file.is_file()))
    return place.stat().st_size if place.exists() else 1


def rows_digest(path: str | Path, reading: Reading) -> str:
    """sha256 that follows a source's content: of its files, as `source_digest`; for one on the hub, of those in the cache."""
    if is_hub_id(path):
        files = [Path(entry["filename"]) for entry in _dataset(path, reading).cache_files]
    elif Path(path).is_dir():
        files = _files(Path(path))
        files = _of_split(files, path, reading) if files else sorted(Path(path).rglob("*.arrow"))
    else:
        return source_digest(path)
    return hashlib.sha256("\n".join(source_digest(file) for file in files).encode()).hexdigest()


class TableReader:
    """The rows of tables, a batch at a time."""

    def __init__(self, path: str | Path, reading: Reading) -> None:
        self.path, self._reading, self.bytes_read = path, reading, 0

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        size, number = size_of(self.path), 0
        with _named(self.path):
            total, batches = _batches(self.path, self._reading)
            for batch in batches:
                for row in batch:
                    number += 1
                    yield number, json.dumps(_without_nulls(row), ensure_ascii=False, default=str).encode()
                self.bytes_read = size * number // max(total, 1)
        self.bytes_read = size


_SPLITS = ("train", "test", "validation", "valid", "dev", "eval")


def _of_split(files: Sequence[Path], path: str | Path, reading: Reading) -> list[Path]:
    """The files of the split, where names begin with one as on the hub (train-00000-of-00002.parquet); else all of them.

    Raises UserError for a split that no file is of, and for a subset, which files do not have.
    """
    if reading.subset is not None:
        raise UserError(
            f"{path}: subset must be left out for files, got {reading.subset!r}; name the files of the subset"
        )
    splits = {file: re.split(r"[-_.]", file.name)[0] for file in files}
    there = sorted(set(splits.values()) & {*_SPLITS, reading.split})
    if not there:
        if reading.split != PLAIN.split:
            raise UserError(
                f"{path}: split must be left out, got {reading.split!r}: no file's name says of which it is"
            )
        return list(files)
    if reading.split not in there:
        raise UserError(f"{path}: split must be one of {', '.join(there)}, got {reading.split!r}")
    return [file for file in files if splits[file] == reading.split]


def _batches(path: str | Path, reading: Reading) -> tuple[int, Iterator[list[dict[str, Any]]]]:
    """How many rows there are, and batches of them."""
    place = Path(path)
    files = [place] if place.suffix in _TABLES and place.is_file() else _files(place) if place.is_dir() else []
    if files:
        require(f"{path}", "pyarrow", "data")
        files = _of_split(files, path, reading) if place.is_dir() else files
        tables = [_parquet(file) if file.suffix == ".parquet" else _arrow(file) for file in files]
        return sum(count for count, _ in tables), (batch for _, read in tables for batch in read())
    dataset = _dataset(path, reading)
    return len(dataset), (_rows(columns) for columns in dataset.iter(batch_size=_BATCH))


def _files(directory: Path) -> list[Path]:
    """The Parquet files of a directory, by name; none where it is a saved dataset."""
    return [] if any((directory / name).is_file() for name in SAVED_DATASET) else sorted(directory.glob("*.parquet"))


Table = tuple[int, Callable[[], Iterator[list[dict[str, Any]]]]]


def _parquet(file: Path) -> Table:
    import pyarrow.parquet as parquet

    opened = parquet.ParquetFile(file)
    return opened.metadata.num_rows, lambda: (batch.to_pylist() for batch in opened.iter_batches(batch_size=_BATCH))


def _arrow(file: Path) -> Table:
    import pyarrow

    try:
        table = pyarrow.ipc.open_file(pyarrow.memory_map(str(file))).read_all()
    except pyarrow.ArrowInvalid:  # a stream, as datasets writes them
        table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()
    return table.num_rows, lambda: (batch.to_pylist() for batch in table.to_batches(max_chunksize=_BATCH))


def _dataset(path: str | Path, reading: Reading) -> Any:
    """One split of a saved dataset, or of one on the hub."""
    require(f"{path}", "datasets", "data")
    import datasets

    with _named(path):
        if not is_hub_id(path):
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(str(path), reading.subset)
    if not isinstance(found, datasets.DatasetDict):
        if reading.split != PLAIN.split:
            raise UserError(f"{path}: split must be left out, got {reading.split!r}: the saved dataset has no splits")
        return found
    if reading.split not in found:
        raise UserError(f"{path}: split must be one of {', '.join(found)}, got {reading.split!r}")
    return found[reading.split]


def _rows(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(member) for key, member in value.items() if member is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Errors of the libraries as one line that names the source."""
    try:
        yield
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # pyarrow and datasets raise many kinds
        raise UserError(f"{path}: cannot be read as a dataset ({named_line(error)})") from error
