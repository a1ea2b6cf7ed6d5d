"""Which rope settings of a config.json can be used; transformers itself reads some wrong ones as something else."""

from __future__ import annotations

from typing import Any

from megatron_ssu.errors import UserError
from megatron_ssu.models.attention import has_nested_ropes

TYPES = ("default", "linear", "llama3", "yarn", "longrope")


def check_rope(hf: dict[str, Any], file: str) -> None:
    """Raises UserError for a type that is not supported, for numbers that are none, and for settings of layer types that the
    model does not have, or lacks."""
    for name in ("rope_parameters", "rope_scaling"):
        settings = hf.get(name) or {}
        if not isinstance(settings, dict):
            raise UserError(f"{file}: {name} must be an object, got {settings!r}; copy the file again")
        nested = {key: value for key, value in settings.items() if isinstance(value, dict)}
        if nested and len(nested) < len(settings):
            flat = next(key for key in settings if key not in nested)
            raise UserError(f"{file}: {name}: {flat} stands beside settings of layer types; copy the file again")
        for prefix, values in ({f"{name}.{k}": v for k, v in nested.items()} or {name: settings}).items():
            _check_settings(values, prefix, file)
    _positive(hf.get("rope_theta", 10000.0), "rope_theta", file)
    _positive(hf.get("partial_rotary_factor", 1.0), "partial_rotary_factor", file)


def check_layer_types(hf: dict[str, Any], config: Any) -> None:
    """Raises UserError where config.json `hf` has one rope for all layers and transformers' `config` one for each type of
    layer, or the other way round: transformers reads such settings as something else without a word."""
    given = hf.get("rope_parameters")
    if not given:
        return
    nested = all(isinstance(value, dict) for value in given.values())
    # Where the file has the one form and the model the other, transformers adds its defaults to what the file says.
    mixed = len({isinstance(value, dict) for value in config.rope_parameters.values()}) > 1
    if mixed or nested != has_nested_ropes(config):
        types = sorted(set(getattr(config, "layer_types", None) or ()))
        wanted = f"an object for each of {', '.join(types)}" if not nested else "one rope for all layers"
        raise UserError(f"config.json: rope_parameters must be {wanted} in a {config.model_type}; copy the file again")
    if nested and (missing := set(config.layer_types) - set(given)):
        raise UserError(f"config.json: rope_parameters.{min(missing)} is missing; copy the file again")


def _check_settings(settings: dict[str, Any], name: str, file: str) -> None:
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind not in TYPES:
        raise UserError(f"{file}: {name}: rope type {kind!r} is not supported; supported are {', '.join(TYPES)}")
    for key, value in settings.items():
        if key in ("rope_type", "type", "truncate"):
            continue
        for number in value if isinstance(value, list) else [value]:
            _positive(number, f"{name}.{key}", file)


def _positive(value: Any, key: str, file: str) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
        raise UserError(f"{file}: {key} must be a number above 0, got {value!r}; copy the file again")
