"""Checks of the section `shield`, for methods that read it: names, and the files that it refers to."""

from __future__ import annotations

from pathlib import Path

from megatron_ssu.config.checks.files import existing_file, jsonl_file
from megatron_ssu.config.checks.values import at_least, seed_in_range
from megatron_ssu.config.schema import RunConfig
from megatron_ssu.methods.options import check_inputs, check_names


def validate_shield(run: RunConfig) -> None:
    """Check the values of the shield section."""
    shield = run.shield
    for section in ("calibration", "target_calibration"):
        for name in ("samples", "sequence_length", "micro_batch_size"):
            at_least(f"shield.{section}.{name}", getattr(getattr(shield, section), name), 1)
        seed_in_range(f"shield.{section}.seed", getattr(shield, section).seed)
    seed_in_range("shield.seed", shield.seed)
    check_names(run)


def validate_shield_files(run: RunConfig) -> None:
    """Check that what the shield section will read is named, and there."""
    shield = run.shield
    for name in ("file", "scores"):
        given = getattr(shield, name)
        if given is not None:
            existing_file(f"shield.{name}", given, "or leave it out to have it made")
    for number, path in enumerate(shield.reserve):
        existing_file(f"shield.reserve.{number}", path)
    for section in ("calibration", "target_calibration"):
        given = getattr(shield, section).path
        for number, path in enumerate(given if isinstance(given, list) else [given]):
            if path is not None:
                jsonl_file(f"shield.{section}.path" + (f".{number}" if isinstance(given, list) else ""), path)
    check_inputs(run, missing=needs_scores(run))


def needs_scores(run: RunConfig) -> bool:
    """Whether this run must score the model to get its shield: not when a shield or scores exist."""
    shield, made = run.shield, Path(run.checkpoint.directory)
    if shield.file or shield.scores:
        return False
    return not any((made / name).is_file() for name in ("shield.safetensors", "scores.safetensors"))
