"""A checkpoint's `.metadata` is a pickle: it may name what torch writes into it, and nothing that runs."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from torch.distributed.checkpoint import filesystem, metadata

from megatron_ssu.errors import UserError
from megatron_ssu.train import storage


def call(module: str, name: str, argument: str, protocol: int) -> bytes:
    """A pickle that calls `module.name(argument)`: names with dots as protocol 4 has them, or the old way."""
    if protocol >= 4:
        words = b"".join(b"\x8c" + bytes([len(w)]) + w.encode() for w in (module, name))
        found = words + b"\x93"
    else:
        found = f"c{module}\n{name}\n".encode()
    text = argument.encode()
    return b"\x80" + bytes([protocol]) + found + b"(X" + len(text).to_bytes(4, "little") + text + b"tR."


PAYLOADS = [
    ("torch.distributed.checkpoint.filesystem", "os.system"),
    ("torch.distributed.checkpoint.metadata", "os.system"),
    ("torch.distributed.checkpoint.metadata", "Metadata.__init__.__globals__"),
    ("torch.distributed.checkpoint.filesystem", "Path.touch"),
    ("torch.distributed.checkpoint.filesystem", "os"),
    ("megatron.core.dist_checkpointing.serialization", "Path"),
    ("torch.serialization", "os.system"),
    ("torch.serialization", "load"),
    ("torch", "Size.__class__"),
    ("torch", "load"),
    ("os", "system"),
    ("posix", "system"),
    ("builtins", "eval"),
    ("builtins", "getattr"),
]


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("module, name", PAYLOADS)
def test_metadata_that_calls_something_is_refused(module, name, protocol, tmp_path):
    evidence = tmp_path / "ran"
    content = call(module, name, f"touch {evidence}", protocol)
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=rf"\.metadata: damaged checkpoint .*{name} has no place") as caught:
        storage._check_metadata(tmp_path)
    assert "\n" not in str(caught.value) and not evidence.exists()


@pytest.mark.parametrize(
    "module, name, protocol",
    [("posix", "system", 2), (filesystem.__name__, "os.system", 4), (filesystem.__name__, "os.system", 5)],
)
def test_the_payloads_would_run(module, name, protocol, tmp_path):
    evidence = tmp_path / "ran"
    pickle.loads(call(module, name, f"touch {evidence}", protocol))
    assert evidence.exists() and os.system is filesystem.os.system


def test_what_torch_writes_is_read(tmp_path):
    for protocol in (4, 5):  # pickle's default
        chunks = [metadata.ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))]
        entries = {
            str(dtype): metadata.TensorStorageMetadata(
                metadata.TensorProperties(dtype=dtype), torch.Size([2, 3]), chunks
            )
            for dtype in (torch.float32, torch.bfloat16, torch.uint8)
        }
        written = metadata.Metadata(
            entries,
            storage_data={metadata.MetadataIndex("a", torch.Size([0, 0])): filesystem._StorageInfo("a.distcp", 0, 9)},
            storage_meta=metadata.StorageMeta(checkpoint_id="here"),
        )
        (tmp_path / ".metadata").write_bytes(pickle.dumps(written, protocol))
        storage._check_metadata(tmp_path)


class Member:
    """Pickles as members of enums do on Python 3.11.0 to 3.11.3."""

    def __init__(self, owner: object, name: str) -> None:
        self.what = owner, name

    def __reduce__(self) -> tuple:
        return getattr, self.what


def test_getattr_may_name_a_memory_format_alone(tmp_path):
    owner = metadata._MEM_FORMAT_ENCODING
    (tmp_path / ".metadata").write_bytes(pickle.dumps([Member(owner, member.name) for member in owner]))
    storage._check_metadata(tmp_path)
    for wrong in (Member(owner, "__class__"), Member(owner, "mro"), Member(metadata.Metadata, "__init__")):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(wrong))
        with pytest.raises(UserError, match=r"builtins\.getattr has no place"):
            storage._check_metadata(tmp_path)
