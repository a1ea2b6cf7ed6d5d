"""Checks of the files that a run reads: looked for, not opened."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_ssu.config.coerce import show
from megatron_ssu.errors import UserError
from megatron_ssu.io.extras import installed

_JSONL = re.compile(r".*\.(jsonl|json)(\.gz|\.zst)?")
ROWS = re.compile(r".*\.((jsonl|json)(\.gz|\.zst)?|parquet|arrow)")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
SAVED_DATASET = ("state.json", "dataset_dict.json")


def data_path(key: str, path: str) -> None:
    """Refuse a `path` that is neither a file of rows, a dataset, nor the prefix of an indexed dataset."""
    if ROWS.fullmatch(path):
        return existing_file(key, path)
    if Path(path).is_dir() and not Path(f"{path}.idx").exists():
        return _dataset_directory(key, path)
    parts = [Path(f"{path}.bin"), Path(f"{path}.idx")]
    missing = [part for part in parts if not part.is_file()]
    if not missing or (_HUB_ID.fullmatch(path) and len(missing) == 2 and installed("datasets")):
        return None
    if len(missing) == 1:
        raise UserError(f"{key}: {missing[0]} is missing beside {(set(parts) - set(missing)).pop()}; run prepare again")
    prefix, suffix = path[:-4], path[-4:]
    if suffix in (".bin", ".idx"):
        raise UserError(f"{key}: {path} is one file of an indexed dataset; write its prefix: {prefix}")
    raise UserError(
        f"{key}: {show(path)} is neither a JSONL (.jsonl or .json, also .gz or .zst), Parquet or Arrow file, nor the prefix of "
        f"an indexed dataset (no {path}.bin and {path}.idx){_hint(path)}"
    )


def _dataset_directory(key: str, path: str) -> None:
    """Refuse a directory that holds neither Parquet files nor what datasets' save_to_disk wrote."""
    if not any((Path(path) / name).is_file() for name in SAVED_DATASET) and not any(Path(path).glob("*.parquet")):
        raise UserError(
            f"{key}: {path} is a directory without Parquet files, and not one that datasets' save_to_disk wrote; name a file "
            "in it"
        )


def jsonl_file(key: str, path: str) -> None:
    """Refuse a `path` that is not named as JSONL, or does not exist."""
    if not _JSONL.fullmatch(path):
        raise UserError(
            f"{key}: {show(path)} is not named as JSONL (.jsonl or .json, also .gz or .zst); rename or convert it"
        )
    existing_file(key, path)


def existing_file(key: str, path: str, advice: str = "") -> None:
    """Refuse a `path` at which there is no file."""
    if Path(path).is_dir():
        raise UserError(f"{key}: {path} is a directory; name a file in it")
    if not Path(path).is_file():
        raise UserError(f"{key}: {show(path)} does not exist; correct it{advice and ', ' + advice}{_hint(path)}")


def _hint(path: str) -> str:
    if path.startswith("~") or "$" in path:
        return "; ~ and variables are not expanded, write the whole path"
    return "" if Path(path).is_absolute() else f"; relative paths start at {Path.cwd()}"
