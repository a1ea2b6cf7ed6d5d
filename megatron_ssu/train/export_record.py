"""The record in an export: which run, checkpoint and shield it was made from (`megatron-ssu.json`)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ssu import __version__
from megatron_ssu.models.hf_files import EXPORT_RECORD
from megatron_ssu.train.identity import SHIELD, Identity

_FORMAT = "megatron-ssu export 1"


@dataclass(frozen=True)
class ExportRecord:
    """What decides an export's weights: of two exports with equal records one need not be written again."""

    source: str  # name of the source model's directory
    source_fingerprint: str
    identity: str  # digest of the run's facts (train/identity.py): data, seeds, optimizer, precision, shield
    iteration: int
    shield: str  # digest of the shield file; "none" for weights that no run has trained
    # Digest of the checkpoint's files: what the identity leaves free, such as the learning rate, shows here.
    checkpoint: str

    def __str__(self) -> str:
        return (
            f"checkpoint {self.checkpoint[:12]}, iteration {self.iteration}, shield "
            f"{self.shield[:12]}, from {self.source}"
        )

    def to_json(self, run: str) -> str:
        """The file's text; `run`: the name of the run's directory, for readers."""
        values = {"format": _FORMAT, "version": __version__, "run": run, **asdict(self)}
        return json.dumps(values, indent=1) + "\n"


def record_of(
    source: str, source_fingerprint: str, facts: dict[str, Any], iteration: int, checkpoint: str
) -> ExportRecord:
    """The record of a checkpoint with these identity facts and this digest of its files."""
    shield = facts.get(SHIELD, "none")
    return ExportRecord(source, source_fingerprint, Identity(facts).digest(), iteration, shield, checkpoint)


def read_record(export: Path) -> ExportRecord | None:
    """The record of an export; None where the directory has no readable one."""
    try:
        values = json.loads((export / EXPORT_RECORD).read_text(encoding="utf-8"))
        if values["format"] != _FORMAT:
            return None
        return ExportRecord(**{name: values[name] for name in ExportRecord.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError):
        return None
