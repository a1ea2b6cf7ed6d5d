"""Small files written whole or not at all: beside their place, to disk, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_ssu.errors import UserError


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file to; at the end of the context the file goes to disk and takes the place of `path`.

    Where anything fails nothing is left of it, and `path` is as before. Raises OSError.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        to_disk(part)
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of files, is on the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, replacing what is there. Raises UserError where it cannot be written; then nothing changed."""
    try:
        with written_aside(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def check_folder(path: str | Path) -> Path:
    """`path`, where files can be written into such a folder, which may be missing; asked before long work. Raises UserError."""
    path = Path(path)
    try:
        place = next(p for p in (path, *path.absolute().parents) if p.exists())
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror}); name another folder") from error
    if not place.is_dir():
        raise UserError(f"{path}: cannot be made ({place} is a file); name another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written (no permission for {place}); name another folder")
    return path


def check_writable(path: str | Path) -> Path:
    """`path`, where a file can be written there; asked before long work. Raises UserError.

    What only a write shows, such as a full disk, `write_text` reports.
    """
    path = Path(path)
    if not path.name or path.is_dir():
        raise UserError(f"{path}: is a directory; name a file")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is not a regular file; name another place")
    if not path.parent.is_dir():
        raise UserError(f"{path}: cannot be written (there is no directory {path.parent}); make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written (no permission for {path.parent}); name another place")
    return path


def check_target(target: str | Path, key: str) -> Path:
    """The whole path of `target`, where a directory can be made there; asked before long work.

    `key` names the option or key that gave it. Raises UserError for a place that is taken or cannot be written.
    """
    if str(target).startswith("~"):
        raise UserError(f"{key}: {target}: ~ is not expanded; write the whole path")
    try:
        path = Path(target).resolve()
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
        parent = next((p for p in path.parents if p.exists()), path)
    except OSError as error:
        raise UserError(f"{key}: {target} cannot be made ({error.strerror}); name another directory") from error
    if path == Path.cwd():
        raise UserError(f"{key}: {str(target)!r} is the current directory; name a directory to make")
    if taken:
        raise UserError(f"{key}: {target} exists already and is not overwritten; name another directory or remove it")
    if not parent.is_dir():
        raise UserError(f"{key}: {target} cannot be made in {parent} (it is a file); name another directory")
    try:
        Path(tempfile.mkdtemp(prefix=".megatron-ssu-", dir=parent)).rmdir()  # permissions do not say all
    except OSError as error:
        raise UserError(
            f"{key}: {target} cannot be made in {parent} ({error.strerror}); name another directory"
        ) from error
    return path
