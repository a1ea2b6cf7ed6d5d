"""The model families, one file each, and which of them a config.json belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ssu.errors import UserError
from megatron_ssu.models.families.llama import LLAMA
from megatron_ssu.models.families.olmo2 import OLMO2
from megatron_ssu.models.family import Dims, Family

FAMILIES = (OLMO2, LLAMA)


def family_of(hf: dict[str, Any]) -> Family:
    """The family of a config.json. Raises UserError, naming what is supported, for others."""
    for family in FAMILIES:
        if hf.get("model_type") in family.model_types:
            family.check(hf)
            return family
    known = ", ".join(t for f in FAMILIES for t in f.model_types)
    raise UserError(f"config.json: model_type {hf.get('model_type')!r} is not supported; supported are {known}")


def read_family(hf: dict[str, Any], directory: str | Path) -> tuple[Family, Dims]:
    """Family and sizes of the config.json `hf` of `directory`. Raises UserError, naming the file, where it is not supported."""
    try:
        return family_of(hf), Dims.from_hf(hf)
    except UserError as error:
        raise UserError(f"{directory}/{error}") from error
