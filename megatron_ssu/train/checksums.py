"""Digests of a checkpoint's files, so that damage on disk is noticed before anything is loaded.

`digests.json` in a checkpoint maps each file's name to its size in bytes and sha256. Every rank digests the files that it
wrote; when a checkpoint is loaded the ranks share its files out and compare.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron_ssu.errors import UserError

DIGESTS = "digests.json"
_CHUNK = 1 << 22

Digests = dict[str, dict[str, Any]]  # file name -> {"bytes": size, "sha256": hex}


def digest_files(files: Iterable[Path], step: Callable[[], None] = lambda: None) -> Digests:
    """`step` is called after every block that was read. Raises OSError where a file cannot be read."""
    return {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file, step)} for file in files}


def write_digests(folder: Path, shards: Iterable[Digests]) -> None:
    """`shards`: what the ranks found; the files beside them are digested here. Raises OSError."""
    found = {name: facts for part in shards for name, facts in part.items()}
    found |= digest_files(file for file in sorted(folder.iterdir()) if file.name not in (DIGESTS, *found))
    (folder / DIGESTS).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def digest_of_all(folder: Path) -> str:
    """sha256 (hex) that stands for all files of the checkpoint in `folder`. Raises UserError where its digests are missing."""
    try:
        return hashlib.sha256((folder / DIGESTS).read_bytes()).hexdigest()
    except OSError as error:
        raise damaged_checkpoint(folder / DIGESTS, error.strerror or str(error)) from error


def check_digests(folder: Path, rank: int, world: int) -> None:
    """Compare this rank's part of the files with their digests.

    Raises:
        UserError: a file is missing, cut or altered.
    """
    listed = folder / DIGESTS
    try:
        expected: Digests = json.loads(listed.read_text())
        for name in sorted(expected)[rank::world]:
            _compare(folder / name, expected[name])
    except FileNotFoundError as error:
        raise damaged_checkpoint(Path(error.filename), "missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged_checkpoint(listed, f"cannot be read ({type(error).__name__}: {error})") from error


def _compare(file: Path, expected: dict[str, Any]) -> None:
    size = file.stat().st_size
    if size != expected["bytes"]:
        raise damaged_checkpoint(file, f"{size} bytes, {expected['bytes']} were written")
    if _sha256(file) != expected["sha256"]:
        raise damaged_checkpoint(file, "its content is not what was written")


def damaged_checkpoint(file: Path, what: str) -> UserError:
    """The one line for a checkpoint that cannot be read."""
    return UserError(f"{file}: damaged checkpoint ({what}); write an older one's number into `latest`")


def _sha256(file: Path, step: Callable[[], None] = lambda: None) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            step()
    return digest.hexdigest()
