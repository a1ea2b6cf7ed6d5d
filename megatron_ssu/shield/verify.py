"""Check that every frozen bit stayed: two Hugging Face directories compared under a shield, bit by bit.

The model's definition in config.json must be the same as well: equal weights under another definition are another model.
Files that define no weight, such as the tokenizer's, are compared and reported.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_ssu.errors import UserError
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.hf_config import CONFIG, differing_keys, read_hf_config
from megatron_ssu.models.hf_files import HFCheckpoint, carried_files
from megatron_ssu.models.hub import model_name
from megatron_ssu.models.matrix import of_experts
from megatron_ssu.shield.mask import GRANULARITIES, Mask
from megatron_ssu.shield.shield_file import Shield, check_model, load_shield

_CHUNK = 1 << 24  # elements compared at a time


@dataclass(frozen=True)
class MatrixReport:
    """One tensor. Units are columns, rows or elements by `granularity`; 'none': not shielded, units are elements."""

    name: str
    shape: tuple[int, ...]
    granularity: str
    frozen: int  # units
    moved_frozen: int  # frozen units with a bit that differs
    trainable: int
    moved_trainable: int
    first_moved: tuple[int, ...] = ()  # the first frozen units that moved


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    `ok` when something is frozen, no frozen bit moved and the adapted model is defined as the source model is.
    """

    source: str
    adapted: str
    shield: str  # digest
    matrices: tuple[MatrixReport, ...]
    definition: tuple[tuple[str, Any, Any], ...] = ()  # keys of config.json that differ: key, source's value, adapted's
    files: tuple[tuple[str, str], ...] = ()  # other files that differ: name, 'differs', 'missing' or 'added'

    @property
    def ok(self) -> bool:
        return self.status == 0

    @property
    def moved(self) -> bool:
        return any(m.moved_frozen for m in self.matrices)

    @property
    def status(self) -> int:
        """Exit status: 0 ok; 1 a frozen bit moved, or the definition differs; 2 nothing is frozen, so nothing is shown."""
        if self.moved or self.definition:
            return 1
        return 0 if any(m.frozen for m in self.matrices) else 2

    @property
    def verdict(self) -> str:
        """The last line of the table."""
        if self.moved:
            return "FAILED: frozen bits moved"
        if self.definition:
            return "FAILED: no frozen bit moved, but config.json defines another model"
        return "OK: no frozen bit moved" if self.ok else "NOTHING CHECKED: nothing is frozen by this shield"

    def totals(self, granularity: str) -> dict[str, int]:
        """Sums over the matrices of one granularity: column, row, element or none. Raises ValueError for another."""
        if granularity not in (*GRANULARITIES, "none"):
            raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)} or none, got {granularity!r}")
        members = [m for m in self.matrices if m.granularity == granularity]
        return {"matrices": len(members)} | _sums(members)

    def granularities(self) -> list[str]:
        return [g for g in ("column", "row", "element", "none") if any(m.granularity == g for m in self.matrices)]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "ok": self.ok,
            "verdict": self.verdict,
            "source": self.source,
            "adapted": self.adapted,
            "shield": self.shield,
            "definition": [{"key": k, "source": a, "adapted": b} for k, a, b in self.definition],
            "files": dict(self.files),
            "totals": {g: self.totals(g) for g in self.granularities()},
            "matrices": [
                asdict(m) | {"shape": list(m.shape), "first_moved": list(m.first_moved)} for m in self.matrices
            ],
        }

    def render(self, console: Console) -> None:
        """Print the table: a line per shielded matrix, or for those of a layer's experts, sums, what else differs, and the
        verdict."""
        table = Table(header_style="bold", box=SIMPLE, pad_edge=False)
        table.add_column("matrix", overflow="fold")
        for heading in ("shape", "by", "frozen", "of these moved", "trainable", "of these moved"):
            table.add_column(heading, justify="left" if heading == "by" else "right")
        lines: dict[tuple[str, tuple[int, ...], str], list[MatrixReport]] = {}
        for m in self.matrices:
            if m.granularity != "none":
                lines.setdefault((of_experts(m.name), m.shape, m.granularity), []).append(m)
        for (name, shape, granularity), members in lines.items():
            several = f" ({len(members)})" if len(members) > 1 else ""
            table.add_row(name + several, "x".join(map(str, shape)), granularity, *_cells(_sums(members)))
        table.add_section()
        for g in self.granularities():
            totals = self.totals(g)
            label = (
                f"{totals['matrices']} not in the shield" if g == "none" else f"{totals['matrices']} matrices by {g}"
            )
            table.add_row(label, "", "element" if g == "none" else g, *_cells(totals), style="bold")
        console.print(table)
        for m in self.matrices:
            if m.moved_frozen:
                where = ", ".join(map(str, m.first_moved)) + (", ..." if m.moved_frozen > len(m.first_moved) else "")
                console.print(f"[red]moved though frozen:[/] {m.name}: {m.moved_frozen} {m.granularity}s ({where})")
        for key, ours, theirs in self.definition:
            console.print(
                Text.assemble(("another definition:", "red"), f" {CONFIG}: {key} is {_show(theirs)}, was {_show(ours)}")
            )
        for name, what in self.files:
            console.print(Text.assemble(("another file:", "yellow"), f" {name}: {what}"))
        console.print(Text(self.verdict, {0: "green", 1: "red"}.get(self.status, "yellow")))


def verify(source_dir: str | Path, adapted_dir: str | Path, shield: Shield | str | Path) -> VerifyReport:
    """Compare raw bits (so -0.0 is not 0.0, and NaN payloads count), one matrix at a time, and the files beside the weights.

    UserError when a file is missing or damaged, the shield is of another model than `source_dir`, or the directories
    differ in tensor names, dtypes or shapes.
    """
    shield = shield if isinstance(shield, Shield) else load_shield(shield)
    source, adapted = HFCheckpoint(source_dir), HFCheckpoint(adapted_dir)
    configs = [read_hf_config(str(path), key) for path, key in ((source_dir, "--source"), (adapted_dir, "--adapted"))]
    check_model(shield, model_fingerprint(source_dir, "--source"), _directory_name(source_dir))
    check_tensors(source, adapted)
    for name, matrix in shield.matrices.items():
        if name not in source:
            raise UserError(f"{source.directory}: has no tensor {name}, which the shield names")
        if source.shape(name) != matrix.shape:
            raise UserError(f"{source.directory}: {name} is {source.shape(name)}, in the shield {matrix.shape}")
    reports = []
    for name in sorted(source.parts(shield.matrices), key=lambda n: _order(shield, n)):
        mask = shield.masks.get(name)
        reports.append(_compare(name, source.raw(name), adapted.raw(name), mask))
    return VerifyReport(
        _directory_name(source_dir),
        _directory_name(adapted_dir),
        shield.digest(),
        tuple(reports),
        tuple(differing_keys(*configs)),
        tuple(_differing_files(source.directory, adapted.directory)),
    )


def _differing_files(source: Path, adapted: Path) -> list[tuple[str, str]]:
    """Files beside the weights that are not the same, config.json apart; JSON files are compared by content."""
    ours, theirs = set(carried_files(source)), set(carried_files(adapted))
    found = []
    for name in sorted((ours | theirs) - {Path(CONFIG)}):
        if name not in theirs:
            found.append((str(name), "missing"))
        elif name not in ours:
            found.append((str(name), "added"))
        elif not _same_content(source / name, adapted / name):
            found.append((str(name), "differs"))
    return found


def _same_content(one: Path, other: Path) -> bool:
    try:
        a, b = one.read_bytes(), other.read_bytes()
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
    if a == b or one.suffix != ".json":
        return a == b
    try:
        return bool(json.loads(a) == json.loads(b))
    except ValueError:
        return False


def _compare(name: str, source: np.ndarray, adapted: np.ndarray, mask: Mask | None) -> MatrixReport:
    """Compare the bits of one tensor: unsigned integers [shape], read in chunks of rows."""
    width = int(np.prod(source.shape[1:], dtype=np.int64))
    step = max(1, _CHUNK // max(1, width))
    granularity = mask.granularity if mask else "none"
    moved = np.zeros(source.shape[1] if granularity == "column" else source.shape[0], dtype=bool)
    frozen = moved_frozen = moved_any = 0
    first: list[int] = []
    for start in range(0, source.shape[0], step):
        rows = slice(start, min(start + step, source.shape[0]))
        differs = source[rows] != adapted[rows]
        if granularity == "column":
            moved |= differs.any(axis=0)
        elif granularity == "row":
            moved[rows] = differs.any(axis=1)
        else:
            differs = differs.reshape(-1)
            moved_any += int(differs.sum())
            if mask:
                wrong = np.flatnonzero(differs & mask.bits(rows.start * width, rows.stop * width))
                moved_frozen += wrong.size
                first += [int(i) + rows.start * width for i in wrong[: 3 - len(first)]]
    units = moved.size if granularity in ("column", "row") else source.size
    if mask:
        frozen = mask.frozen_units
    if mask and granularity != "element":
        wrong = np.flatnonzero(moved & mask.bits())
        moved_frozen, moved_any, first = wrong.size, int(moved.sum()), [int(i) for i in wrong[:3]]
    return MatrixReport(
        name,
        tuple(source.shape),
        granularity,
        frozen,
        int(moved_frozen),
        int(units) - frozen,
        moved_any - int(moved_frozen),
        tuple(first),
    )


def check_tensors(source: HFCheckpoint, adapted: HFCheckpoint) -> None:
    """UserError unless both hold tensors of the same names, dtypes and shapes."""
    ours, theirs = set(source.names()), set(adapted.names())
    for names, where in ((ours - theirs, adapted.directory), (theirs - ours, source.directory)):
        if names:
            raise UserError(f"{where}: lacks {len(names)} tensors that the other model has, such as {min(names)}")
    for name in sorted(ours):
        for what, a, b in (
            ("dtype", source.dtype(name), adapted.dtype(name)),
            ("shape", source.shape(name), adapted.shape(name)),
        ):
            if a != b:
                raise UserError(
                    f"{adapted.directory}: {name} has {what} {b}, in {source.directory} {a}; export it alike"
                )


def _order(shield: Shield, name: str) -> tuple[int, str]:
    matrix = shield.matrices.get(name)
    return (-1 if matrix is None or matrix.layer is None else matrix.layer, name)


def _directory_name(path: str | Path) -> str:
    return model_name(path)


def _show(value: Any) -> str:
    return "not set" if value is None else json.dumps(value)


def _sums(members: Sequence[MatrixReport]) -> dict[str, int]:
    keys = ("frozen", "moved_frozen", "trainable", "moved_trainable")
    return {key: sum(getattr(m, key) for m in members) for key in keys}


def _cells(values: dict[str, Any]) -> list[str]:
    """Frozen, moved frozen, trainable, moved trainable with its fraction."""
    share = f" {values['moved_trainable'] / values['trainable']:7.2%}" if values["trainable"] else ""
    wrong = f"[red]{values['moved_frozen']:,}[/]" if values["moved_frozen"] else "0"
    return [f"{values['frozen']:,}", wrong, f"{values['trainable']:,}", f"{values['moved_trainable']:,}{share}"]
