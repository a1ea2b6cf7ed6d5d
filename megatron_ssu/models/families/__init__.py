"""The model families, one file each, and which of them a config.json belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ssu.config.checks.model_sizes import model_sizes
from megatron_ssu.errors import UserError
from megatron_ssu.models.families.gemma import GEMMA2, GEMMA3
from megatron_ssu.models.families.llama import LLAMA
from megatron_ssu.models.families.mistral import MISTRAL
from megatron_ssu.models.families.mixtral import MIXTRAL
from megatron_ssu.models.families.olmo2 import OLMO2
from megatron_ssu.models.families.olmoe import OLMOE
from megatron_ssu.models.families.phi3 import PHI3
from megatron_ssu.models.families.qwen2 import QWEN2
from megatron_ssu.models.families.qwen3 import QWEN3
from megatron_ssu.models.families.qwen3_moe import QWEN3_MOE
from megatron_ssu.models.families.smollm3 import SMOLLM3
from megatron_ssu.models.family import Dims, Family
from megatron_ssu.models.hf_config import normalised
from megatron_ssu.models.rope_settings import check_layer_types, check_rope

FAMILIES = (OLMO2, LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, PHI3, GEMMA2, GEMMA3, QWEN3_MOE, MIXTRAL, OLMOE)


def family_of(hf: dict[str, Any]) -> Family:
    """The family of a config.json. Raises UserError, naming what is supported, for others."""
    for family in FAMILIES:
        if hf.get("model_type") in family.model_types:
            _check(hf, family)
            return family
    known = ", ".join(t for f in FAMILIES for t in f.model_types)
    raise UserError(f"config.json: model_type {hf.get('model_type')!r} is not supported; supported are {known}")


def _check(hf: dict[str, Any], family: Family) -> None:
    """Raises UserError for settings that the project, or the family's code, does not carry."""
    if hf.get("quantization_config"):
        raise UserError(
            "config.json: quantization_config is not supported: frozen weights could not keep their bits; take the model "
            "before it was quantised"
        )
    check_rope(hf, "config.json")
    model_sizes(hf, "config.json")
    config = normalised(hf)
    check_layer_types(hf, config)
    family.check(config)


def read_family(hf: dict[str, Any], directory: str | Path) -> tuple[Family, Dims]:
    """Family and sizes of the config.json `hf` of `directory`. Raises UserError, naming the file, where it is not supported."""
    try:
        return family_of(hf), Dims.from_hf(hf)
    except UserError as error:
        raise UserError(f"{directory}/{error}") from error
