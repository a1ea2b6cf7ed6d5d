"""Reading JSONL, plain or compressed (.gz, .zst), line by line; every complaint names file and line."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from megatron_ssu.errors import UserError, one_line

_MIB = 1 << 20
_WHOLE_FILE_BYTES = 1 << 30  # up to this size a source's digest covers every byte
_SAMPLED_BLOCKS = 1024  # of a MiB, of a larger source
_ZSTD_WINDOW = 1 << 31  # files made with --long=31 are read too


class BadLine(ValueError):
    """A line that holds no usable document; the message says why, without file and number."""


class LineReader:
    """The lines of a file as bytes, numbered from 1, blank ones left out.

    `bytes_read` grows to the file's size on disk while the lines are read: the measure of progress.
    Raises UserError for a file that cannot be read or whose compressed stream is damaged or cut.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.bytes_read = 0

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        number = 0
        try:
            with open(self.path, "rb") as raw, _decompressed(raw, self.path.suffix) as stream:
                for number, line in enumerate(stream, 1):
                    self.bytes_read = raw.tell()
                    if number == 1:
                        line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark is not part of the JSON
                    if line.strip():
                        yield number, line
                self.bytes_read = raw.tell()
        except EOFError as error:
            raise UserError(f"{self.path}:{number + 1}: the compressed file ends too early; it was cut off") from error
        except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise UserError(f"{self.path}:{number + 1}: damaged {self.path.suffix} file ({one_line(error)})") from error
        except OSError as error:
            where = f"{self.path}:{number + 1}" if number else str(self.path)
            raise UserError(f"{where}: cannot be read ({error.strerror or one_line(error)})") from error


def _decompressed(raw: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw, mode="rb")  # type: ignore[return-value]
    if suffix == ".zst":
        return io.BufferedReader(_ZstdStream(raw), buffer_size=_MIB)  # type: ignore[return-value]
    return raw


class _ZstdStream(io.RawIOBase):
    """All frames of a .zst file in turn. (zstandard's own reader takes a cut frame for the end of the file.)"""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._compressed = b""
        self._plain = memoryview(b"")
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            if not self._compressed:
                self._compressed = self._raw.read(1 << 16)
                if not self._compressed:
                    if self._frame is not None:
                        raise EOFError
                    return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
            self._plain = memoryview(self._frame.decompress(self._compressed))
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._plain))
        buffer[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises BadLine."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLine(f"not UTF-8 (byte {error.start} of the line)") from None
    except json.JSONDecodeError as error:
        raise BadLine(f"broken JSON ({error.msg} at character {error.pos})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested thousands deep
        raise BadLine(f"broken JSON ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise BadLine(f"not a JSON object but {_json_type(value)}")
    return value


def text_of(value: dict[str, Any], text_key: str = "text") -> str:
    """The text in a line's object. Raises BadLine."""
    if text_key not in value:
        keys = ", ".join(map(repr, list(value)[:8])) or "none"
        raise BadLine(f"no {text_key!r} in it (keys: {keys}); name its columns under `columns`")
    text = value[text_key]
    if not isinstance(text, str):
        raise BadLine(f"{text_key!r} is not a string but {_json_type(text)}")
    return check_unicode(text)


def check_unicode(text: str) -> str:
    """`text` itself. Raises BadLine when it cannot be UTF-8: JSON can spell half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadLine(f"half of a surrogate pair at character {error.start} of the text") from None
    return text


def _json_type(value: Any) -> str:
    kinds = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return kinds.get(type(value), "null")


def source_digest(path: str | Path) -> str:
    """sha256 of a source file's size and content; above 1 GiB of 1024 blocks of a MiB that are spread over it evenly.

    Every start reads the sources for it, so it takes no longer than 1 GiB does. File times do not count: a copy is the
    same text. Raises UserError when the file cannot be read.
    """
    path = Path(path)
    try:
        status = path.stat()
        digest = hashlib.sha256(f"{status.st_size}\n".encode())
        with open(path, "rb") as file:
            if status.st_size <= _WHOLE_FILE_BYTES:
                while chunk := file.read(_MIB):
                    digest.update(chunk)
            else:
                for block in range(_SAMPLED_BLOCKS):
                    file.seek(block * (status.st_size - _MIB) // (_SAMPLED_BLOCKS - 1))
                    digest.update(file.read(_MIB))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from error
    return digest.hexdigest()
