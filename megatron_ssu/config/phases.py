"""The phases of a run: each is a run of its own that starts from the model which the one before it ended with.

    <checkpoint.directory>/phases/1-english/            directory of phase `english`: checkpoints, scores, shield, run.yaml
    <checkpoint.directory>/phases/1-english/model/      its export, the model.path of the next phase
    <checkpoint.directory>/data/                        tokenized text of all phases

Keys that name a model or a shield file may name an earlier phase instead, as `phase:NAME`: the model that it ended with, or the
shield that it was trained under. `phase:start` is model.path, the model before the first phase.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ssu.config.coerce import show
from megatron_ssu.config.schema import DataSection, RunConfig
from megatron_ssu.errors import UserError

REFERENCE = "phase:"
_START = "start"
_METHOD_MODELS = ("before",)  # options of methods that name a model
SHIELD_NAME = "shield.safetensors"


def phase_directory(run: RunConfig, number: int) -> Path:
    """The directory of phase `number`, from 0, of a run."""
    return Path(run.checkpoint.directory) / "phases" / f"{number + 1}-{run.phases[number].section.name}"


def phase_export(run: RunConfig, number: int) -> Path:
    """The Hugging Face directory that phase `number` ends with."""
    last = number + 1 == len(run.phases)
    given = run.phases[number].section.export or (run.checkpoint.export if last else None)
    return Path(given) if given else phase_directory(run, number) / "model"


def phase_runs(run: RunConfig) -> list[RunConfig]:
    """The run file of every phase, in order; without phases the run file alone.

    Raises UserError for a reference to a phase that does not come before the one that makes it.
    """
    if not run.phases:
        return [run]
    return [_phase_run(run, number) for number in range(len(run.phases))]


def _phase_run(run: RunConfig, number: int) -> RunConfig:
    own, directory = run.phases[number].run, phase_directory(run, number)
    start = str(phase_export(run, number - 1)) if number else own.model.path
    placed = replace(
        own,
        model=replace(own.model, path=start),
        checkpoint=replace(own.checkpoint, directory=str(directory), export=str(phase_export(run, number))),
        data=_placed_data(run, number),
    )

    def model(key: str, given: str | None) -> str | None:
        return _referred(run, number, key, given, run.model.path, lambda earlier: phase_export(run, earlier))

    def shield(key: str, given: str | None) -> str | None:
        return _referred(run, number, key, given, None, lambda earlier: _shield_of(run, earlier))

    return _with_references(placed, model, shield)


def _placed_data(run: RunConfig, number: int) -> DataSection:
    """A phase's data section; tokenized text is kept for all phases together."""
    data = run.phases[number].run.data
    return replace(data, directory=data.directory or str(Path(run.checkpoint.directory) / "data"))


def checked_run(run: RunConfig, number: int) -> RunConfig:
    """The run file of phase `number` as it can be checked before any phase has run.

    Earlier phases' models stand for model.path, which is defined alike; shields that they will make are left out.
    """
    own = run.phases[number].run
    start, directory = run.model.path, phase_directory(run, number)

    def model(key: str, given: str | None) -> str | None:
        return start if _refers(given) else given

    def shield(key: str, given: str | None) -> str | None:
        return None if _refers(given) else given

    checked = _with_references(own, model, shield)
    if _refers(own.shield.file) or _refers(own.shield.change_from):
        # What will be there is not missing: the score random reads nothing.
        section = replace(checked.shield, file=None, change_from=None, score="random", also_score=[])
        checked = replace(checked, shield=replace(section, norms="trainable") if _refers(own.shield.file) else section)
    return replace(
        checked,
        checkpoint=replace(checked.checkpoint, directory=str(directory), export=None),  # the export is looked at later
        data=_placed_data(run, number),
    )


def _with_references(run: RunConfig, model: Callable, shield: Callable) -> RunConfig:
    """The run file with what `model` and `shield` make of each key that names one."""
    section = run.shield
    reserve = [shield("shield.reserve", path) for path in section.reserve]
    section = replace(
        section,
        change_from=model("shield.change_from", section.change_from),
        file=shield("shield.file", section.file),
        reserve=[path for path in reserve if path is not None],
    )
    options = {name: _options(f"method.{name}", value, model) for name, value in run.method.options.items()}
    return replace(run, shield=section, method=replace(run.method, options=options))


def _options(key: str, options: Any, model: Callable) -> Any:
    named = {f.name for f in fields(options)} & set(_METHOD_MODELS) if is_dataclass(options) else set()
    return replace(options, **{name: model(f"{key}.{name}", getattr(options, name)) for name in named})


def _refers(given: str | None) -> bool:
    return given is not None and given.startswith(REFERENCE)


def _referred(
    run: RunConfig,
    number: int,
    key: str,
    given: str | None,
    start: str | None,
    place: Callable[[int], Path],
) -> str | None:
    """What `given` names: itself, or what an earlier phase than `number` will have made."""
    if given is None or not _refers(given):
        return given
    name = given.removeprefix(REFERENCE)
    if name == _START and start is not None:
        return start
    earlier = [phase.section.name for phase in run.phases[:number]]
    if name not in earlier:
        known = [*([_START] if start is not None else []), *earlier]
        before = f"must be one of {', '.join(REFERENCE + n for n in known)}" if known else "no phase comes before"
        raise UserError(f"phases.{number}.{key}: {before}, got {show(given)}")
    return str(place(earlier.index(name)))


def _shield_of(run: RunConfig, number: int) -> Path:
    given = _phase_run(run, number).shield.file
    return Path(given) if given is not None else phase_directory(run, number) / SHIELD_NAME


def phase_named(run: RunConfig, name: str | None) -> RunConfig:
    """The run file of the phase of that name; where `name` is None of the newest phase that has begun, else of the first.

    A run file without phases is its own. Raises UserError, listing the phases, for a name that none has.
    """
    runs = phase_runs(run)
    if not run.phases:
        if name is not None:
            raise UserError(f"--phase: the run file has no phases, got {show(name)}; leave it out")
        return run
    names = [phase.section.name for phase in run.phases]
    if name is not None and name not in names:
        raise UserError(f"--phase: must be one of {', '.join(names)}, got {show(name)}")
    if name is not None:
        return runs[names.index(name)]
    begun = [own for own in runs if Path(own.checkpoint.directory).is_dir()]
    return (begun or runs)[-1 if begun else 0]
