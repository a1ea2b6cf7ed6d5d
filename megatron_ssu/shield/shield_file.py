"""The shield: which elements of the matrices are frozen, as packed bits in memory and on disk.

A set bit (True) means FROZEN. Per matrix one granularity: 'column' holds a bit for each of the I columns, 'row' one for
each of the O rows, 'element' one an element (row-major). Bits are packed eight to a byte, lowest bit first, unused bits
zero. On disk: a safetensors file of uint8 tensors named like the matrices. A matrix that is not in it is trainable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ssu.errors import UserError
from megatron_ssu.io.checksummed import SealedFile, seal, write_sealed
from megatron_ssu.models.hf_config import difference
from megatron_ssu.models.matrix import Matrix, matrices_from_json, matrices_to_json
from megatron_ssu.shield.mask import Mask

FORMAT = "megatron-ssu shield 1"


@dataclass
class Shield:
    """All masks of a model, and where they come from.

    Paths, times and meshes are kept out: equal shields are equal bytes.
    """

    method: str
    model: str  # name of the model directory
    fingerprint: str  # of weights and config.json, see models/fingerprint.py
    matrices: dict[str, Matrix]
    masks: Mapping[str, Mask]  # keys: those of `matrices`
    score: str = "none"
    granularity: str = "column"
    budget: str = "none"
    ratio: float | None = None  # as asked for; `realised` says what came out
    calibration: str = "none"  # digest of the calibration samples
    plan: dict[str, Any] = field(default_factory=dict)  # the other choices, as JSON
    made: dict[str, Any] | None = None  # of a composed shield: the operation and what it was made of
    counts: dict[str, int] = field(default_factory=dict)  # frozen elements by matrix

    def __post_init__(self) -> None:
        if set(self.masks) != set(self.matrices):
            raise ValueError("masks and matrices of a shield differ in names")
        if not self.counts:
            self.counts = {name: self.masks[name].frozen_elements for name in self.matrices}

    @property
    def label(self) -> str:
        """What messages call it: the file that it was read from, if any."""
        return str(self.masks.file.path) if isinstance(self.masks, FileMasks) else "the shield"

    def ratio_of(self, name: str) -> float:
        """Frozen fraction of a matrix."""
        return self.counts[name] / max(1, self.matrices[name].elements)

    def realised(self) -> dict[str, dict[str, Any]]:
        """Frozen elements, elements and their ratio: of the layers' linear weights, and of all it names."""
        result = {}
        for key, members in (
            ("linear", [m for m in self.matrices.values() if m.scored]),
            ("all", list(self.matrices.values())),
        ):
            frozen, total = sum(self.counts[m.name] for m in members), sum(m.elements for m in members)
            result[key] = {"frozen": frozen, "elements": total, "ratio": frozen / total if total else 0.0}
        return result

    def header(self) -> dict[str, Any]:
        """What stands in the file's header, less the digests."""
        matrices = matrices_to_json(self.matrices)
        for name, entry in matrices.items():
            entry["granularity"] = self._granularity_of(name)
            entry["frozen"] = self.counts[name]
        return {
            "format": FORMAT,
            "method": self.method,
            "score": self.score,
            "granularity": self.granularity,
            "budget": self.budget,
            "ratio": self.ratio,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "calibration": self.calibration,
            "plan": self.plan,
            "made": self.made,
            "realised": self.realised(),
            "matrices": matrices,
        }

    def digest(self) -> str:
        """sha256 (hex) of header and bits: the same as that of the file."""
        if isinstance(self.masks, FileMasks):
            return self.masks.file.digest
        sealed = seal(self.header(), {name: mask.packed for name, mask in self.masks.items()})
        return str(sealed["sha256"])

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the shield file; UserError when `path` is taken."""
        write_sealed(path, self.header(), {n: m.packed for n, m in self.masks.items()}, overwrite=overwrite)

    def _granularity_of(self, name: str) -> str:
        if isinstance(self.masks, FileMasks):
            return self.masks.granularity_of(name)
        return self.masks[name].granularity


class FileMasks(Mapping[str, Mask]):
    """The masks of a shield file, read (and checked against their digest) one by one and not kept."""

    def __init__(self, file: SealedFile) -> None:
        self.file = file
        self._entries = file.header["matrices"]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def granularity_of(self, name: str) -> str:
        """Without reading the mask."""
        return str(self._entries[name]["granularity"])

    def __getitem__(self, name: str) -> Mask:
        entry = self._entries[name]
        packed = self.file.get(name)
        try:
            mask = Mask(entry["granularity"], tuple(entry["shape"]), packed)
        except ValueError as error:
            raise UserError(
                f"{self.file.path}: the shield file is damaged at {name}: {error}; make it again"
            ) from error
        if mask.frozen_elements != entry["frozen"]:
            raise UserError(f"{self.file.path}: {name} freezes {mask.frozen_elements} elements, not {entry['frozen']}")
        return mask


def load_shield(path: str | Path, *, check: bool = False) -> Shield:
    """Open a shield file; masks are read and checked one by one when asked for, with `check` all of them now.

    UserError when the file is missing, of another kind, truncated or altered.
    """
    file = SealedFile(path, FORMAT, "shield")
    h = file.header
    try:
        if set(file.names()) != set(h["matrices"]):
            raise UserError(f"{path}: the shield file's masks and matrices differ; make it again")
        masks = FileMasks(file)
        shield = Shield(
            method=h["method"],
            model=h["model"],
            fingerprint=h["fingerprint"],
            matrices=matrices_from_json(h["matrices"]),
            masks=masks,
            score=h["score"],
            granularity=h["granularity"],
            budget=h["budget"],
            ratio=h["ratio"],
            calibration=h["calibration"],
            plan=h["plan"],
            made=h["made"],
            counts={name: h["matrices"][name]["frozen"] for name in sorted(h["matrices"])},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: the shield file's header lacks {error}; make it again") from error
    if check:
        for name in masks:
            masks[name]
    return shield


def check_model(shield: Shield, fingerprint: str, model_name: str) -> None:
    """UserError with the shield's file and both names when it was made for another model than that of `fingerprint`."""
    if shield.fingerprint != fingerprint:
        raise UserError(
            f"{shield.label}: made for model {shield.model} and not for {model_name}: other "
            f"{difference(shield.fingerprint, fingerprint)}; plan one for this model"
        )
