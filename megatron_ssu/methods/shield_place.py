"""The shield file of a run whose method makes its shield itself, without scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ssu.errors import UserError
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.shield.shield_file import Shield, check_model, load_shield

if TYPE_CHECKING:
    from megatron_ssu.config.schema import RunConfig
    from megatron_ssu.models.source import Source


NAME = "shield.safetensors"


def own_shield_path(run: RunConfig, name: str = NAME) -> Path:
    return Path(run.checkpoint.directory) / name


def refuse_given_files(run: RunConfig) -> None:
    """Raises UserError for a shield or scores of the user's, which the method would not read."""
    for key in ("file", "scores"):
        if getattr(run.shield, key) is not None:
            raise UserError(
                f"shield.{key}: does not go with method.name: {run.method.name}, which makes its own shield; leave it out"
            )


def kept_shield(run: RunConfig, shield: Shield, name: str = NAME) -> None:
    """Write the shield file; one that says the same is left as it is. Raises UserError where it says otherwise."""
    path = own_shield_path(run, name)
    if path.exists():
        check_same(run, shield, name)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    shield.save(path)


def check_same(run: RunConfig, shield: Shield, name: str = NAME) -> None:
    """Raises UserError where the run directory has a shield file with another shield."""
    path = own_shield_path(run, name)
    found = load_shield(path) if path.exists() else shield
    if found.digest() == shield.digest():
        return
    check_plan(path, found, shield.method, shield.plan)
    raise UserError(
        f"{path}: is not the shield that method {shield.method} makes for this model; choose another checkpoint.directory"
    )


def check_plan(path: str | Path, found: Shield, method: str, plan: Mapping[str, Any]) -> None:
    """Raises UserError where a shield file was made by another method than `method`, or with other options than `plan`."""
    advice = "change that back, or choose another checkpoint.directory"
    if found.method != method:
        raise UserError(f"{path}: is the shield of method {found.method}, the run file's is {method}; {advice}")
    for key, now in plan.items():
        was = found.plan.get(key)
        if was != now:
            raise UserError(f"{path}: was made with method.{method}.{key} {was}, the run file has {now}; {advice}")


def own_shield(run: RunConfig, source: Source, name: str = NAME) -> Shield:
    """The run's shield out of its file, all masks checked. Raises UserError where it is damaged or another model's."""
    shield = load_shield(own_shield_path(run, name), check=True)
    check_model(shield, model_fingerprint(source.path), source.name)
    return shield
