"""Checks of the section `checkpoint`: where a run writes."""

from __future__ import annotations

from pathlib import Path

from megatron_ssu.config.checks.values import at_least
from megatron_ssu.config.schema import RunConfig
from megatron_ssu.config.units import parse_size
from megatron_ssu.errors import UserError


def validate_checkpoint(run: RunConfig) -> None:
    """Check where the run writes; nothing that is there already may be in the way."""
    checkpoint = run.checkpoint
    at_least("checkpoint.interval", checkpoint.interval, 0)
    if checkpoint.keep is not None:
        at_least("checkpoint.keep", checkpoint.keep, 1)
    parse_size(checkpoint.max_shard_size)
    if not checkpoint.directory:
        raise UserError("checkpoint.directory: is empty; name the folder that this run may write to")
    for key, written in (("checkpoint.directory", checkpoint.directory), ("checkpoint.export", checkpoint.export)):
        if written is None:
            continue
        if Path(written).exists() and not Path(written).is_dir():
            raise UserError(f"{key}: {written} is a file; name a folder")
        if Path(written).resolve() == Path(run.model.path).resolve():
            raise UserError(f"{key}: {written} is model.path, which stays as it is; name another folder")
