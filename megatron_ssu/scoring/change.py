"""change: how far weights moved from another checkpoint, `shield.change_from`.

Element |W_ij - B_ij|, column and row the L2 norm over it, matrix ||W - B||_F / ||B||_F, for W [O, I] and B of the other
checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ssu.errors import UserError
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.hf_config import read_hf_config, weights_part
from megatron_ssu.models.hf_files import HFCheckpoint
from megatron_ssu.scoring.base import Elements, Score, Summed, root, square, weight

KEY = "shield.change_from"
_READABLE = ("F64", "F32", "BF16", "F16")


def _square_before(w: Any, before: Any) -> Any:
    return before * before


def _relative(moved: Any, before: Any) -> Any:
    """A matrix that was zero has moved by its own norm."""
    return (moved / (before + (before == 0))) ** 0.5


CHANGE = Score(
    "change",
    needs="change",
    column=Summed((square,), root),
    row=Summed((square,), root),
    element=Elements(weight),
    matrix=Summed((square, _square_before), _relative),
)


def open_before(model: str | Path, before: str | Path) -> HFCheckpoint:
    """The checkpoint that the model in directory `model` is compared with; reads headers only.

    Raises UserError where it is missing, or not of the model's family, tensor names and shapes.
    """
    ours, theirs = read_hf_config(str(model)), read_hf_config(str(before), KEY)
    if ours.get("model_type") != theirs.get("model_type"):
        raise UserError(
            f"{KEY}: {before} must be of model_type {ours.get('model_type')!r} like {model}, got "
            f"{theirs.get('model_type')!r}; name an earlier checkpoint of the same model"
        )
    checkpoint, other = HFCheckpoint(model), HFCheckpoint(before)
    differing = sorted(set(checkpoint.names()) ^ set(other.names()))
    if differing:
        lacking, having = (before, model) if differing[0] in checkpoint else (model, before)
        raise UserError(
            f"{KEY}: {before} must have the tensors of {model}, but {lacking} lacks {differing[0]}, which {having} has; "
            "name an earlier checkpoint of the same model"
        )
    for name in checkpoint.names():
        entry, shape = other.entry(name), checkpoint.shape(name)
        if entry.shape != shape:
            raise UserError(f"{KEY}: {name} must be {list(shape)} as in {model}, got {list(entry.shape)} in {before}")
        if entry.dtype not in _READABLE:
            raise UserError(f"{KEY}: {name} must be {', '.join(_READABLE)}, got {entry.dtype} in {before}")
    if weights_part(model_fingerprint(model)) == weights_part(model_fingerprint(before)):
        raise UserError(f"{KEY}: {before} must have other weights than {model}, which have not changed since")
    return other
