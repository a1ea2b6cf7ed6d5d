"""A model's fingerprint: identifies a model after reading a little of it.

It has two parts, WEIGHTS:CONFIG, so that a message can say which of the two is another: a sha256 over the tensors, and the
first 16 digits of one over what of config.json defines the model (`hf_config.definition`).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron_ssu.errors import UserError
from megatron_ssu.models.hf_config import definition_digest, read_hf_config
from megatron_ssu.models.hf_files import HFCheckpoint, TensorEntry

_EDGE = 4096  # bytes read at each end of a tensor
_SAMPLE = 256
_SAMPLES = 16


def model_fingerprint(hf_dir: str | Path, key: str = "model.path") -> str:
    """WEIGHTS:CONFIG in hex digits, see above. `key`: the run file's key or the option that names the directory.

    Raises UserError when a file is missing, broken or truncated.
    """
    return f"{_weights_fingerprint(hf_dir)}:{definition_digest(read_hf_config(str(hf_dir), key))[:16]}"


def _weights_fingerprint(hf_dir: str | Path) -> str:
    """sha256 (hex) over name, dtype, shape and sampled bytes of every tensor, in order of names.

    Of each tensor the first and last 4 KiB and 16 evenly spread pieces of 256 bytes are read (all of a small one), so
    it does not depend on how tensors are divided into files, and a changed dtype, shape or training run changes it. It
    does not prove that two models are equal to the bit.
    """
    checkpoint = HFCheckpoint(hf_dir)
    digest = hashlib.sha256()
    for name in checkpoint.names():
        entry = checkpoint.entry(name)
        digest.update(f"{name}\0{entry.dtype}\0{'x'.join(map(str, entry.shape))}\0".encode())
        for piece in _pieces(entry):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(entry: TensorEntry) -> list[bytes]:
    """The sampled bytes of a tensor."""
    if entry.nbytes <= 2 * _EDGE + _SAMPLES * _SAMPLE:
        ranges = [(0, entry.nbytes)]
    else:
        last = entry.nbytes - _SAMPLE
        ranges = [(0, _EDGE), (entry.nbytes - _EDGE, _EDGE)]
        ranges += [(last * i // (_SAMPLES - 1), _SAMPLE) for i in range(_SAMPLES)]
    pieces = []
    with entry.file.open("rb") as stream:
        for offset, length in ranges:
            stream.seek(entry.start + offset)
            piece = stream.read(length)
            if len(piece) != length:
                raise UserError(f"{entry.file}: became shorter while it was read; is it still being written?")
            pieces.append(piece)
    return pieces
