"""Checks of the section `data`."""

from __future__ import annotations

from megatron_ssu.config.checks.files import data_path
from megatron_ssu.config.checks.values import at_least
from megatron_ssu.config.schema import DataSource, Ramp, RunConfig
from megatron_ssu.config.sources import is_weight, isolates, train_sources
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
    for number, source in enumerate(train_sources(run)):
        key = "data.train" if isinstance(data.train, str) else f"data.train.{number}"
        data_path(key, source.path)
        if not is_weight(source.weight):
            raise UserError(f"{key}.weight: must be above 0, got {_shown(source.weight)}; leave the part out instead")
        _columns(key, source)
    if isolates(run) and run.parallel.context > 1:
        raise UserError(
            "data.cross_document_attention: false does not go with parallel.context_parallel_size: "
            f"{run.parallel.context}; set one of them otherwise"
        )
    for name in ("source_valid", "target_valid"):
        given = getattr(data, name)
        if isinstance(given, dict):
            for key, path in given.items():
                data_path(f"data.{name}.{key}", path)
        elif given is not None:
            data_path(f"data.{name}", given)


FIELDS = (
    "text",
    "prompt",
    "completion",
    "messages",
    "conversations",
    "tools",
    "instruction",
    "input",
    "output",
    "system",
)


def _columns(key: str, source: DataSource) -> None:
    """Refuse a mapping to what nobody reads."""
    for name in source.columns:
        if name not in FIELDS:
            raise UserError(f"{key}.columns: must map one of {', '.join(FIELDS)}, got {name!r}")


def _shown(weight: float | Ramp) -> str:
    return f"{weight.start} to {weight.end}" if isinstance(weight, Ramp) else str(weight)
