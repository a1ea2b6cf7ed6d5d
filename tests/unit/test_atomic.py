"""Small files: whole or not at all."""

from __future__ import annotations

import errno
import os

import pytest

from megatron_ssu.errors import UserError
from megatron_ssu.io import atomic
from megatron_ssu.io.atomic import check_writable, write_text


def test_a_failed_write_leaves_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_text(path, "one")
    for name in ("fsync", "replace"):

        def full(*arguments):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch, pytest.raises(UserError, match=r"x: cannot be written \(No space"):
            patch.setattr(atomic.os, name, full)
            write_text(path, "two")
        assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]
    write_text(path, "two")
    assert path.read_text() == "two" and list(tmp_path.iterdir()) == [path]


def test_places_that_cannot_be_written_are_known_before(tmp_path):
    (tmp_path / "file").write_text("")
    for path, word in (("none/x", "no directory"), ("file/x", "no directory"), ("", "is a directory")):
        with pytest.raises(UserError, match=word):
            check_writable(tmp_path / path)
    assert check_writable(tmp_path / "file") == tmp_path / "file" and check_writable("x").name == "x"
    with pytest.raises(UserError, match="cannot be written"):
        write_text(tmp_path / "none" / "x", "")
