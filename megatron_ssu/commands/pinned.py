"""Models of the Hugging Face hub that a command names: pinned and fetched before anything else looks at them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import yaml

from megatron_ssu.config.schema import RunConfig
from megatron_ssu.errors import UserError
from megatron_ssu.models.hub import download, is_pinned, is_reference, parts, pin

_OPTIONS = ("model", "models", "source", "adapted")  # of commands that take models without a run file
_WAIT = timedelta(days=2)  # for another process of this node that downloads

Pinning = Callable[[str, str], str]  # (reference, key that named it) -> the pinned reference


def pin_run(run: RunConfig, *, weights: bool = True) -> None:
    """Pin the models that a run file names, in all its phases, to commits, and fetch them; collective under torchrun.

    A run that has begun keeps its commit, which its saved run file has, unless a commit is asked for. Without `weights` config
    and tokenizer alone are fetched. Raises UserError, on all ranks alike.
    """
    found: dict[str, str] = {}
    saved = _saved_references(run)
    timeout = run.parallel.timeout_minutes

    def pinned(reference: str, key: str) -> str:
        if reference not in found:
            found[reference] = _pinned(
                saved.get(reference.partition("@")[0], reference), reference, key, weights, timeout
            )
        return found[reference]

    if run.phases and run.model.hf_path is not None:
        raise UserError(
            "model.hf_path: does not go with phases; write the Megatron checkpoint as a Hugging Face directory first: "
            "python tools/checkpoint/convert.py --loader megatron --saver hf"
        )
    for own in (run, *(phase.run for phase in run.phases)):
        _pin_section(own, pinned)
        if own.model.hf_path is not None and not weights:  # what needs no weights needs no Megatron checkpoint
            own.model.path, own.model.hf_path = own.model.hf_path, None


def _pin_section(run: RunConfig, pinned: Pinning) -> None:
    if run.model.hf_path is not None and is_reference(run.model.hf_path):
        run.model.hf_path = pinned(run.model.hf_path, "model.hf_path")
    if is_reference(run.model.path):
        run.model.path = pinned(run.model.path, "model.path")
    if run.shield.change_from is not None and is_reference(run.shield.change_from):
        run.shield.change_from = pinned(run.shield.change_from, "shield.change_from")
    for name, options in run.method.options.items():
        before = getattr(options, "before", None)
        if isinstance(before, str) and is_reference(before):
            run.method.options[name] = replace(options, before=pinned(before, f"method.{name}.before"))


def pin_options(options: argparse.Namespace, *, weights: bool = True) -> None:
    """The same of a command's options; `options.models` is a list."""
    for name in _OPTIONS:
        given = getattr(options, name, None)
        named = ("verify", "dial", "similarity", "prepare", *(("pack",) if name != "model" else ()))
        key = f"--{name}" if options.command in named else options.command
        if isinstance(given, str):
            setattr(options, name, pin_path(given, key, weights=weights))
        elif isinstance(given, list):
            setattr(options, name, [pin_path(path, key, weights=weights) for path in given])


def pin_path(path: str | Path, key: str, *, weights: bool = True) -> str:
    """A model's directory, as it is, or a hub id as a pinned reference whose files are there; `key` named it. Collective."""
    reference = str(path)
    return _pinned(reference, reference, key, weights, 30.0) if is_reference(reference) else reference


def _saved_references(run: RunConfig) -> dict[str, str]:
    """id -> pinned reference of the run file that is saved in the run's directory; none where it is not there yet."""
    try:
        saved = yaml.safe_load((Path(run.checkpoint.directory) / "run.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return {parts(path)[0]: path for path in _strings(saved) if is_pinned(path)}


def _strings(value: object) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _pinned(saved: str, reference: str, key: str, weights: bool, timeout_minutes: float) -> str:
    """Rank 0 asks the hub, the first rank of every node downloads."""
    wanted = reference if is_pinned(reference) else saved
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        pinned = pin(wanted, key)
        download(pinned, key, weights=weights)
        return pinned
    from megatron_ssu.engine.mesh import start_processes
    from megatron_ssu.engine.ranks import on_each_node, on_rank_zero

    start_processes(timeout_minutes)
    pinned = on_rank_zero(lambda: pin(wanted, key))
    on_each_node(pinned, lambda: download(pinned, key, weights=weights), _WAIT)
    return pinned
