"""Check bit by bit that a model is its source and some packs, and that none of them touched another's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_ssu.errors import UserError
from megatron_ssu.models.hf_config import CONFIG, differing_keys, read_hf_config
from megatron_ssu.models.hf_files import HFCheckpoint
from megatron_ssu.models.hub import model_name
from megatron_ssu.packs.apply import check_stackable
from megatron_ssu.packs.weights import two_dimensional
from megatron_ssu.shield.pack_file import Pack, row_chunks
from megatron_ssu.shield.verify import check_tensors


@dataclass
class PackReport:
    """The weights of one pack in a model; or, where `pack` is None, those that no pack moves."""

    pack: str | None
    digest: str = ""
    elements: int = 0
    wrong: int = 0  # that are not what the pack, or the source, makes of them
    first: str = ""  # the first tensor with such


@dataclass
class PacksReport:
    """What `verify_packs` found."""

    source: str
    adapted: str
    packs: list[PackReport]  # that of no pack last
    definition: list[tuple[str, Any, Any]] = field(default_factory=list)  # keys of config.json that differ

    @property
    def status(self) -> int:
        """Exit status: 0 every weight is as the packs and the source make it; 1 one is not, or config.json differs."""
        return int(bool(self.definition) or any(report.wrong for report in self.packs))

    @property
    def verdict(self) -> str:
        if any(report.wrong for report in self.packs):
            return "FAILED: weights differ from what the source and the packs make of them"
        if self.definition:
            return f"FAILED: every weight is as it should be, but {CONFIG} defines another model"
        return "OK: the source and these packs, bit for bit; no pack touched another's weights"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "ok": self.status == 0,
            "verdict": self.verdict,
            "source": self.source,
            "adapted": self.adapted,
            "definition": [{"key": k, "source": a, "adapted": b} for k, a, b in self.definition],
            "packs": [asdict(report) for report in self.packs],
        }

    def render(self, console: Console) -> None:
        """Print a line per pack, what else differs, and the verdict."""
        table = Table(header_style="bold", box=SIMPLE, pad_edge=False)
        table.add_column("weights of", overflow="fold")
        table.add_column("elements", justify="right")
        table.add_column("of these wrong", justify="right")
        for report in self.packs:
            table.add_row(report.pack or "no pack", f"{report.elements:,}", f"{report.wrong:,}")
        console.print(table)
        for report in self.packs:
            if report.wrong:
                console.print(Text(f"not as it should be: {report.first}", "red"))
        for key, ours, theirs in self.definition:
            console.print(Text(f"another definition: {CONFIG}: {key} is {theirs!r}, was {ours!r}", "red"))
        console.print(Text(self.verdict, "red" if self.status else "green"))


def verify_packs(source_dir: str | Path, adapted_dir: str | Path, packs: Sequence[Pack]) -> PacksReport:
    """Compare a model with its source and packs, all raw bits, a few rows at a time.

    Raises UserError where packs do not go together, or the directories differ in tensor names, dtypes or shapes.
    """
    check_stackable(packs)
    source, adapted = HFCheckpoint(source_dir), HFCheckpoint(adapted_dir)
    check_tensors(source, adapted)
    reports = [PackReport(str(pack.path), pack.digest) for pack in packs]
    rest = PackReport(None)
    for name in source.names():
        _compare(name, source, adapted, list(zip(packs, reports, strict=True)), rest)
    configs = [read_hf_config(str(path), key) for path, key in ((source_dir, "--source"), (adapted_dir, "--adapted"))]
    return PacksReport(
        model_name(source_dir), model_name(adapted_dir), [*reports, rest], list(differing_keys(*configs))
    )


def _compare(
    name: str, source: HFCheckpoint, adapted: HFCheckpoint, packs: list[tuple[Pack, PackReport]], rest: PackReport
) -> None:
    shape = source.shape(name)
    changes = [(pack.change(name), report) for pack, report in packs if name in pack.moved]
    for pack, _ in packs:
        if name in pack.moved and pack.moved[name].shape != shape:
            raise UserError(
                f"{pack.path}: {name} is {list(pack.moved[name].shape)}, in {source.directory} {list(shape)}"
            )
    before, after = (two_dimensional(checkpoint.raw(name)) for checkpoint in (source, adapted))
    for rows in row_chunks(shape or (1,)):
        expected = np.array(before[rows])
        alone = np.ones(expected.shape, dtype=bool)
        for change, _ in changes:
            at = change.place.of(rows)
            alone[at] = False
            expected[at] ^= change.next(expected[at].size).reshape(expected[at].shape)
        wrong = expected != after[rows]
        for change, report in changes:
            _count(report, name, wrong[change.place.of(rows)])
        _count(rest, name, wrong[alone])


def _count(report: PackReport, name: str, wrong: np.ndarray) -> None:
    report.elements += int(wrong.size)
    report.wrong += int(wrong.sum())
    if report.wrong and not report.first:
        report.first = name
