"""The scores file: scores of every matrix by column, by row and of the whole, the same for every mesh.

Tensors are float64, keyed `{score}/{axis}/{matrix}`; axis 'column' has [I] values, 'row' [O] ones, 'matrix' a single one.
Statistics of the inputs use the same keys: `input_norm/column/{matrix}` is ||X_j||_2 over all calibration tokens,
`input_mean_square/column/{matrix}` the mean over calibration rows of the mean over the row's tokens of X_tj^2,
`target_input_norm/column/{matrix}` is ||X_j||_2 over all tokens of the target text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_ssu.errors import UserError
from megatron_ssu.io.checksummed import SealedFile, write_sealed
from megatron_ssu.models.matrix import Matrix, matrices_from_json, matrices_to_json

FORMAT = "megatron-ssu scores 1"
Axis = Literal["column", "row", "matrix"]
INPUT_NORM = "input_norm"
INPUT_MEAN_SQUARE = "input_mean_square"
TARGET_INPUT_NORM = "target_input_norm"


@dataclass
class Scores:
    """What a calibration pass found. `matrices` lists every weight a shield may name, norms and embeddings too."""

    model: str  # name of the model directory
    fingerprint: str  # of weights and config.json, see models/fingerprint.py
    matrices: dict[str, Matrix]
    tensors: dict[str, np.ndarray]  # "{score}/{axis}/{matrix}" -> float64 [I], [O] or [1]
    scores: list[str]  # names that can be planned with; other prefixes of `tensors` are statistics
    calibration: str = "none"  # digest of the calibration samples
    samples: int = 0
    tokens: int = 0
    settings: dict[str, Any] = field(default_factory=dict)  # JSON values: what else the scores depend on

    def get(self, score: str, axis: Axis, matrix: str) -> np.ndarray:
        """Values of one matrix, float64. UserError when the file has none, or when one is NaN or infinite."""
        key = f"{score}/{axis}/{matrix}"
        if key not in self.tensors:
            raise UserError(
                f"scores of {self.model}: no {score} by {axis} for {matrix};"
                f" it has {', '.join(self.available()) or 'none'}"
            )
        values = self.tensors[key]
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise UserError(
                f"scores of {self.model}: {score} of {matrix} is NaN or infinite in {bad.size} of {values.size} {axis}s"
                f" (first: {axis} {bad[0]}); look for broken weights or activations there"
            )
        return values

    def column(self, score: str, matrix: str) -> np.ndarray:
        """float64 [I]; see `get`."""
        return self.get(score, "column", matrix)

    def row(self, score: str, matrix: str) -> np.ndarray:
        """float64 [O]; see `get`."""
        return self.get(score, "row", matrix)

    def setting(self, key: str) -> Any:
        """A value of `settings`. UserError when the file has none."""
        if key not in self.settings:
            raise UserError(f"scores of {self.model}: the header lacks {key}; make the scores again")
        return self.settings[key]

    def has(self, score: str, axis: Axis, matrix: str) -> bool:
        return f"{score}/{axis}/{matrix}" in self.tensors

    def unreached(self) -> list[str]:
        """Matrices that no calibration token went through, sorted: those of idle experts. Their scores of inputs are 0."""
        values = {m.name: self.tensors.get(f"{INPUT_NORM}/column/{m.name}") for m in self.matrices.values() if m.scored}
        return sorted(name for name, value in values.items() if value is not None and not value.any())

    def available(self) -> list[str]:
        """What there is, as `score/axis`, sorted."""
        return sorted({"/".join(key.split("/", 2)[:2]) for key in self.tensors})

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the scores file; equal scores give equal bytes. UserError when `path` is taken."""
        header = {
            "format": FORMAT,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "calibration": self.calibration,
            "samples": self.samples,
            "tokens": self.tokens,
            "scores": list(self.scores),
            "settings": self.settings,
            "matrices": matrices_to_json(self.matrices),
        }
        tensors = {key: np.asarray(value, dtype=np.float64) for key, value in self.tensors.items()}
        self._check_sizes(tensors, f"{path}")
        write_sealed(path, header, tensors, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read a scores file. UserError when it is missing, of another kind, truncated or altered."""
        file = SealedFile(path, FORMAT, "scores")
        header = file.header
        try:
            scores = cls(
                model=header["model"],
                fingerprint=header["fingerprint"],
                matrices=matrices_from_json(header["matrices"]),
                tensors={name: file.get(name) for name in file.names()},
                scores=list(header["scores"]),
                calibration=header["calibration"],
                samples=header["samples"],
                tokens=header["tokens"],
                settings=header["settings"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: the scores file's header lacks {error}; make it again") from error
        cls._check_sizes(scores, scores.tensors, f"{path}")
        return scores

    def _check_sizes(self, tensors: Mapping[str, np.ndarray], where: str) -> None:
        for key, value in tensors.items():
            score, _, rest = key.partition("/")
            axis, _, name = rest.partition("/")
            matrix = self.matrices.get(name)
            if axis not in ("column", "row", "matrix") or matrix is None:
                raise UserError(
                    f"{where}: tensor {key!r} must be SCORE/AXIS/MATRIX of a known matrix, AXIS column, row or matrix"
                )
            expected = (axis_units(axis, matrix.shape),)
            if value.shape != expected:
                raise UserError(f"{where}: {score} by {axis} of {name} has shape {value.shape}, expected {expected}")


def axis_units(axis: str, shape: tuple[int, ...]) -> int:
    """How many values a score of a matrix of `shape` has by axis."""
    return {"column": shape[-1], "row": shape[0], "matrix": 1}[axis]


def random_bits(seed: int, matrix: str, axis: str, n: int) -> np.ndarray:
    """uint32 [n] that depend on seed, matrix name, axis and position alone: the same on every mesh and machine.

    Philox's raw stream is used, as numpy promises it for ever; its distributions may change between versions.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}/{axis}/{matrix}".encode()).digest()[:16], "little")
    raw = np.random.Philox(key=key).random_raw((n + 1) // 2)
    return raw.astype("<u8", copy=False).view("<u4")[:n]


def random_scores(seed: int, matrix: str, axis: Axis, n: int) -> np.ndarray:
    """The `random` score: float64 [n] in [0, 1)."""
    return random_bits(seed, matrix, axis, n) * 2.0**-32
