"""Checks of the section `data`."""

from __future__ import annotations

import math

from megatron_ssu.config.checks.files import data_path
from megatron_ssu.config.checks.values import at_least
from megatron_ssu.config.schema import DataSource, RunConfig
from megatron_ssu.config.units import parse_split
from megatron_ssu.errors import UserError


def validate_data(run: RunConfig) -> None:
    """Check the data section, and that its files are there."""
    data = run.data
    at_least("data.sequence_length", data.sequence_length, 1)
    at_least("data.workers", data.workers, 1)
    at_least("data.loader_workers", data.loader_workers, 0)
    parse_split(data.used_split)
    if not data.text_key:
        raise UserError(
            "data.text_key: is empty; name the key of the JSONL lines that holds the text, for example text"
        )
    if not data.train:
        raise UserError("data.train: missing; name a JSONL file or the prefix of an indexed dataset, or a list of them")
    if isinstance(data.train, str):
        data_path("data.train", data.train)
    else:
        for number, part in enumerate(data.train):
            source = part if isinstance(part, DataSource) else DataSource(part)
            data_path(f"data.train.{number}", source.path)
            if not (math.isfinite(source.weight) and source.weight > 0):
                raise UserError(
                    f"data.train.{number}.weight: must be above 0, got {source.weight}; leave the part out instead"
                )
    for name in ("source_valid", "target_valid"):
        given = getattr(data, name)
        if isinstance(given, dict):
            for key, path in given.items():
                data_path(f"data.{name}.{key}", path)
        elif given is not None:
            data_path(f"data.{name}", given)
