"""Checks of the section `shield`, for methods that read it: names, and the files that it refers to."""

from __future__ import annotations

from pathlib import Path

from megatron_ssu.config.checks.files import existing_file, jsonl_file
from megatron_ssu.config.checks.values import at_least, seed_in_range
from megatron_ssu.config.schema import RunConfig
from megatron_ssu.errors import UserError
from megatron_ssu.methods.options import check_names
from megatron_ssu.scoring import base


def validate_shield(run: RunConfig) -> None:
    """Check the shield section, and that what it will read is there."""
    shield, calibration = run.shield, run.shield.calibration
    for name in ("samples", "sequence_length", "micro_batch_size"):
        at_least(f"shield.calibration.{name}", getattr(calibration, name), 1)
    seed_in_range("shield.seed", shield.seed)
    seed_in_range("shield.calibration.seed", calibration.seed)
    check_names(run)
    for name in ("file", "scores"):
        given = getattr(shield, name)
        if given is not None:
            existing_file(f"shield.{name}", given, "or leave it out to have it made")
    paths = calibration.path if isinstance(calibration.path, list) else [calibration.path]
    for number, path in enumerate(p for p in paths if p is not None):
        key = "shield.calibration.path" + (f".{number}" if isinstance(calibration.path, list) else "")
        jsonl_file(key, path)
    if not calibration.path and needs_calibration(run):
        read = [name for name in (shield.score, *shield.also_score) if base.needs_calibration([name])]
        weights = [name for name in base.NAMES if not base.needs_calibration([name])]
        raise UserError(
            f"shield.calibration.path: missing; {f'score {read[0]!r}' if read else 'shield.norms half'} reads source chat "
            f"samples (JSONL); give them, or shield.file, shield.scores, or a score of the weights alone "
            f"({', '.join(weights)})"
        )


def needs_calibration(run: RunConfig) -> bool:
    """Whether this run must forward calibration samples to get its shield: not when a shield or scores exist."""
    shield, made = run.shield, Path(run.checkpoint.directory)
    if shield.file or shield.scores:
        return False
    if not base.needs_calibration([shield.score, *shield.also_score]) and shield.norms != "half":
        return False
    return not any((made / name).is_file() for name in ("shield.safetensors", "scores.safetensors"))
