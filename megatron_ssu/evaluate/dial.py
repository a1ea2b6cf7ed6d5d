"""A model between a source and what it was adapted to: every weight a + alpha (b - a), rounded once to the stored dtype.

Where both have the same bits they stay, so frozen weights do at every alpha; alpha 0 gives the source's bits, 1 those of the
adapted model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from megatron_ssu import __version__
from megatron_ssu.errors import UserError
from megatron_ssu.io.atomic import check_target
from megatron_ssu.io.dtypes import STORED_NAMES
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.hf_files import EXPORT_RECORD, HFCheckpoint, row_window
from megatron_ssu.models.matrix import ATTENTION_KINDS, MLP_KINDS
from megatron_ssu.models.source import Source
from megatron_ssu.packs.weights import CARD, heads, other_files, two_dimensional, write_directory
from megatron_ssu.shield.pack_file import row_chunks

GROUPS = ("attention", "mlp", "embeddings", "norms")  # weights that are dialled together; norms: biases and routers too
_FORMAT = "megatron-ssu dial 1"
_DTYPES: dict[str, torch.dtype] = {stored: getattr(torch, name) for stored, name in STORED_NAMES.items()}


def groups_of(source: Source) -> dict[str, str]:
    """Every tensor's group."""
    kinds = {row_window(m.name)[0]: m.kind for m in source.family.matrices(source.dims)}
    found = dict.fromkeys(source.checkpoint.names(), "norms")
    for name in found:
        kind = kinds.get(name, "head" if name.startswith("lm_head") else "norm")
        if kind in ATTENTION_KINDS:
            found[name] = "attention"
        elif kind in MLP_KINDS:
            found[name] = "mlp"
        elif kind in ("embedding", "head"):
            found[name] = "embeddings"
    return found


def write_point(
    source: Source, adapted: HFCheckpoint, alphas: Mapping[str, float], target: str | Path, key: str = "--export"
) -> None:
    """Write the model at `alphas`, one of every group, as a Hugging Face directory with the source's files.

    Raises UserError for a place that is taken or cannot be written (`key` named it), and for weights that are no floating-point
    numbers and differ.
    """
    path, groups = check_target(target, key), groups_of(source)
    checkpoint = source.checkpoint

    def parts(name: str) -> Iterator[np.ndarray]:
        pair = [two_dimensional(each.raw(name)) for each in (checkpoint, adapted)]
        for rows in row_chunks(checkpoint.shape(name) or (1,)):
            a, b = (np.array(raw[rows]) for raw in pair)
            yield between(a, b, alphas[groups[name]], checkpoint.dtype(name), name)

    def fill(folder: Path) -> None:
        for name in other_files(checkpoint.directory):
            if name not in (EXPORT_RECORD, CARD):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes((checkpoint.directory / name).read_bytes())
        ends = {
            side: {"name": each.directory.resolve().name, "fingerprint": model_fingerprint(each.directory, key)}
            for side, each in (("source", checkpoint), ("adapted", adapted))
        }
        record = {"format": _FORMAT, "version": __version__, "alphas": dict(alphas), **ends}
        (folder / EXPORT_RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    write_directory(path, heads(checkpoint), parts, fill)


def between(a: np.ndarray, b: np.ndarray, alpha: float, dtype: str, name: str) -> np.ndarray:
    """Bits of a + alpha (b - a), computed in fp64, of the bits `a` and `b` [r, n] of two tensors."""
    if alpha == 0 or alpha == 1:
        return b if alpha else a
    same = a == b
    if same.all():
        return a
    if dtype not in _DTYPES:
        raise UserError(f"{name}: must be of {', '.join(_DTYPES)} to be dialled, got {dtype}, and it differs")
    before, after = (_numbers(bits, dtype).double() for bits in (a, b))
    mixed = torch.lerp(before, after, alpha).to(_DTYPES[dtype])
    return np.where(same, a, _bits(mixed, a.dtype))


def _numbers(bits: np.ndarray, dtype: str) -> torch.Tensor:
    signed = {2: np.int16, 4: np.int32}[bits.itemsize]
    return torch.from_numpy(bits.view(signed)).view(_DTYPES[dtype])


def _bits(numbers: torch.Tensor, like: np.dtype) -> np.ndarray:
    signed = {2: torch.int16, 4: torch.int32}[numbers.element_size()]
    return numbers.contiguous().view(signed).numpy().view(like)
