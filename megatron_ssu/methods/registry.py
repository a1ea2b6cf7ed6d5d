"""The methods there are. A new one is a class in a file of its own and a line in METHODS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megatron_ssu.config.coerce import show
from megatron_ssu.config.length import with_iterations
from megatron_ssu.config.load import load_run
from megatron_ssu.config.schema import RunConfig, ShieldSection
from megatron_ssu.errors import UserError
from megatron_ssu.methods.base import Method
from megatron_ssu.methods.gmt import GradientMaskTuning
from megatron_ssu.methods.hft import HalfFineTuning
from megatron_ssu.methods.layers import LayerFreezing
from megatron_ssu.methods.lora import LowRankAdaptation
from megatron_ssu.methods.lota import LotteryTicketAdaptation
from megatron_ssu.methods.s2ft import SparseFineTuning
from megatron_ssu.methods.ssu import SourceShieldedUpdates

METHODS: tuple[type[Method], ...] = (
    Method,
    SourceShieldedUpdates,
    HalfFineTuning,
    SparseFineTuning,
    LayerFreezing,
    GradientMaskTuning,
    LotteryTicketAdaptation,
    LowRankAdaptation,
)


_NAMES = [method.name for method in METHODS]
if len(set(_NAMES)) < len(_NAMES):
    raise ValueError(f"two methods have one name: {', '.join(_NAMES)}")


def read_run(
    path: str | Path, overrides: Sequence[str] = (), prepare: Callable[[RunConfig], None] = lambda run: None
) -> RunConfig:
    """The run file at `path` with its methods' options; see `load_run`. `prepare` may change it before its model is looked at.

    Where the method's own options stand for keys of the shield section, those are set, in every phase. Raises UserError where
    the run file gives one of them another value.
    """
    run = load_run(path, overrides, {method.name: method.Options for method in METHODS})
    prepare(run)
    phases = [replace(phase, run=with_iterations(_decided(path, phase.run))) for phase in run.phases]
    return replace(run if phases else with_iterations(_decided(path, run)), phases=phases)


def _decided(path: str | Path, run: RunConfig) -> RunConfig:
    method, defaults = method_of(run), ShieldSection()
    decided = method.decides(run)
    for key, value in decided.items():
        given = getattr(run.shield, key)
        if given not in (value, getattr(defaults, key)):
            raise UserError(
                f"{path}: shield.{key}: {show(given)} does not go with method.name: {method.name}, whose own options set it; "
                "leave it out"
            )
    return replace(run, shield=replace(run.shield, **decided))


def method_of(run: RunConfig) -> Method:
    """The run's method with its options. Raises UserError, listing the methods there are, for an unknown name."""
    for method in METHODS:
        if method.name == run.method.name:
            return method(run.method.options.get(method.name))
    known = ", ".join(method.name for method in METHODS)
    raise UserError(f"method.name: must be one of {known}, got {show(run.method.name)}")


def option_names(method: type[Method]) -> list[str]:
    """The keys under `method.<name>`."""
    options: Any = method.Options
    return [field.name for field in fields(options)]
