"""Train the phases of a run, one after the other; those that have ended are left as they are."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from megatron_ssu.commands.start import start
from megatron_ssu.config.load import save_run
from megatron_ssu.config.phases import REFERENCE, checked_run, phase_export, phase_runs
from megatron_ssu.config.schema import RunConfig
from megatron_ssu.config.sources import replays
from megatron_ssu.data.run_datasets import prepare_run, run_tokenizer
from megatron_ssu.engine.ranks import on_all_ranks, on_rank_zero
from megatron_ssu.errors import UserError
from megatron_ssu.generate.answers import open_job
from megatron_ssu.generate.replay import NAME
from megatron_ssu.io.atomic import check_target, write_text
from megatron_ssu.methods.options import check_names
from megatron_ssu.methods.planned import shield_path
from megatron_ssu.methods.registry import method_of
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.hub import model_name
from megatron_ssu.shield.compose import moved_on
from megatron_ssu.shield.shield_file import Shield, load_shield
from megatron_ssu.train.checkpoints import Checkpoints, Progress
from megatron_ssu.train.export_record import read_record
from megatron_ssu.train.latest import checkpoints_folder, latest_iteration
from megatron_ssu.train.run_lock import held
from megatron_ssu.train.sinks import evaluations
from megatron_ssu.train.trainer import Trainer

Train = Callable[[RunConfig, Console, RunConfig | None], Progress]
GIVEN_SHIELD = "given-shield.safetensors"


def train_phases(run: RunConfig, console: Console, train: Train) -> None:
    """Check all phases and prepare their data, then `train` each on the model that the one before it ended with."""
    runs = on_all_ranks(lambda: phase_runs(run))
    for number in range(len(runs)):
        with _named(run, number):
            checked = checked_run(run, number)
            start(checked, method_of(checked), training=True)
            on_all_ranks(lambda number=number: _check_settings(run, number))  # type: ignore[misc]
    with held(run.checkpoint.directory, "train"):
        on_rank_zero(lambda: _check_exports(run, runs))
        on_rank_zero(lambda: save_run(run, Path(run.checkpoint.directory) / "run.yaml"))
        on_rank_zero(lambda: _prepare(run, console))
        for number, phase in enumerate(runs):
            section = run.phases[number].section
            console.print(f"phase {number + 1} of {len(runs)}: {section.name}", highlight=False, markup=False)
            with _named(run, number):
                own = on_rank_zero(lambda number=number, phase=phase: _with_given_shield(run, number, phase))  # type: ignore[misc]
                train(own, console, runs[number - 1] if section.optimizer == "kept" else None)
            gc.collect()
        on_rank_zero(lambda: _summary(run, runs, console))


@contextmanager
def _named(run: RunConfig, number: int) -> Iterator[None]:
    """Errors within say which phase they are of."""
    try:
        yield
    except UserError as error:
        message = str(error)
        if not message.startswith("phases."):
            message = f"phase {run.phases[number].section.name}: {message}"
        named = UserError(message)
        named.agreed = error.agreed
        raise named from error


def _check_settings(run: RunConfig, number: int) -> None:
    """Raises UserError where a phase does not go with what earlier phases will have made."""
    section, own = run.phases[number].section, run.phases[number].run
    if method_of(own).planned:
        check_names(own)  # `checked_run` leaves out what refers to earlier phases
    for key, given in (("file", own.shield.file), *(("reserve", path) for path in own.shield.reserve)):
        if given is not None and given.startswith(REFERENCE):
            _check_makes_shield(run, number, f"shield.{key}", given)
    if section.optimizer == "kept":
        _check_kept(run, number)


def _check_makes_shield(run: RunConfig, number: int, key: str, given: str) -> None:
    """Raises UserError where the phase that `given` names trains under no shield of a file."""
    named = next(phase for phase in run.phases if REFERENCE + phase.section.name == given)
    method = method_of(named.run)
    if not method.shields or (method.adapts and not method.planned):
        raise UserError(
            f"phases.{number}.{key}: must name a phase with a shield, got {given}, whose method is {method.name}"
        )


def _check_kept(run: RunConfig, number: int) -> None:
    """Raises UserError where the phase could not take over the optimizer of the phase before."""
    own = run.phases[number].run
    key = f"phases.{number}.optimizer"
    if number == 0:
        raise UserError(f"{key}: must be fresh in the first phase, got kept")
    method, before = method_of(own), method_of(run.phases[number - 1].run)
    if method.adapts:
        raise UserError(f"{key}: must be fresh with method.name: {method.name}, whose adapters are new, got kept")
    if (method.name, method.options) != (before.name, before.options):
        raise UserError(
            f"{key}: must be fresh where method or its options change from phase to phase, got kept ({before.name}, then "
            f"{method.name})"
        )
    if method.planned and own.shield.file is None:
        earlier = run.phases[number - 1].section.name
        raise UserError(
            f"{key}: must be fresh where the phase plans a shield of its own, got kept; or name the shield of the phase "
            f"before: shield.file: phase:{earlier}"
        )


def _begun(run: RunConfig) -> bool:
    return latest_iteration(checkpoints_folder(run.checkpoint.directory)) is not None


def _check_exports(run: RunConfig, runs: list[RunConfig]) -> None:
    """Raises UserError where a phase that has not begun could not be exported, or two phases would be to one place."""
    places: dict[Path, str] = {}
    for number, phase in enumerate(runs):
        target, name = phase_export(run, number), run.phases[number].section.name
        other = places.setdefault(target.resolve(), name)
        if other != name:
            raise UserError(f"phases.{number}.export: {target} is that of phase {other} too; name another directory")
        if not _begun(phase):
            _check_moved(run, runs, number)
            check_target(str(target), f"phases.{number}.export")


def _check_moved(run: RunConfig, runs: list[RunConfig], number: int) -> None:
    """Raises UserError where checkpoint.export has the export of the phase that was the last one before this one was added."""
    for earlier, phase in enumerate(runs[:number]):
        ended = latest_iteration(checkpoints_folder(phase.checkpoint.directory)) == phase.train.iterations
        moved = ended and read_record(phase_export(run, earlier)) is None
        if moved and read_record(phase_export(run, number)) is not None:
            name, place = run.phases[earlier].section.name, phase_export(run, number)
            raise UserError(
                f"phases.{number}: {place} has the export of phase {name}, which was the last; give that phase "
                f"`export: {place}` and this one, or checkpoint.export, another directory"
            )


def _prepare(run: RunConfig, console: Console) -> None:
    """Tokenize the data of all phases that have not ended, so that a bad line is met before the first of them trains."""
    for number in range(len(run.phases)):
        if read_record(phase_export(run, number)) is None:
            with _named(run, number):
                own = checked_run(run, number)
                prepare_run(own, run_tokenizer(own), console)
                if own.replay.generate is not None and replays(own):  # what cannot be asked
                    open_job(run.model.path, NAME, own.replay.generate, trust_remote_code=own.model.trust_remote_code)


def _with_given_shield(run: RunConfig, number: int, phase: RunConfig) -> RunConfig:
    """The phase's run file, with a shield that was made for an earlier phase's model in a file for the model as it is now."""
    given = phase.shield.file
    if given is None or number == 0:
        return phase
    shield, models = load_shield(given), [run.model.path, *(str(phase_export(run, i)) for i in range(number))]
    fingerprints = [model_fingerprint(path) for path in models]
    if shield.fingerprint not in fingerprints or shield.fingerprint == fingerprints[-1]:
        return phase
    target = Path(phase.checkpoint.directory) / GIVEN_SHIELD
    target.parent.mkdir(parents=True, exist_ok=True)
    moved_on(load_shield(given, check=True), fingerprints[-1], model_name(models[-1])).save(target, overwrite=True)
    return replace(phase, shield=replace(phase.shield, file=str(target)))


def take_optimizer(before: RunConfig, trainer: Trainer, shield: Shield) -> None:
    """Load the optimizer's state of the last checkpoint of the run `before`; collective.

    Raises UserError where that run trained other weights: under another shield the moments are those of others.
    """
    checkpoints = Checkpoints(before.checkpoint.directory)

    def checked() -> int:
        path = shield_path(before)
        masks = load_shield(path).masks if path.exists() else {}
        if set(masks) != set(shield.masks) or not all(masks[name].equals(shield.masks[name]) for name in masks):
            raise UserError(
                f"optimizer: kept: {path} lets other weights train than {shield.label}; take that shield with shield.file, or "
                "begin with optimizer: fresh"
            )
        latest = checkpoints.latest()
        if latest is None:
            raise UserError(
                f"{checkpoints.folder}: holds no checkpoint to keep the optimizer of; begin with optimizer: fresh"
            )
        return latest

    latest = on_rank_zero(checked)
    checkpoints.load_optimizer(latest, trainer.session, trainer.optimizer_state, trainer.method)


def _summary(run: RunConfig, runs: list[RunConfig], console: Console) -> None:
    """Print the losses of every validation set after each phase, and write them as phases.json."""
    rows: list[dict[str, Any]] = []
    for number, phase in enumerate(runs):
        found = evaluations(Path(phase.checkpoint.directory) / "metrics.jsonl")
        name = run.phases[number].section.name
        if number == 0 and found and found[0]["iteration"] == 0:
            rows.append({"phase": "start", "model": run.model.path, "losses": _losses(found[0])})
        rows.append(
            {
                "phase": name,
                "iterations": latest_iteration(checkpoints_folder(phase.checkpoint.directory)),
                "model": str(phase_export(run, number)),
                "shield": str(shield_path(phase)) if shield_path(phase).exists() else None,
                "losses": _losses(found[-1]) if found else {},
            }
        )
    write_text(Path(run.checkpoint.directory) / "phases.json", json.dumps(rows, indent=1) + "\n")
    names = list(dict.fromkeys(name for row in rows for name in row["losses"]))
    table = Table("after phase", *(name.replace("_", " ") for name in names), "model", box=SIMPLE, pad_edge=False)
    for row in rows:
        cells = [f"{row['losses'][name]:.4f}" if name in row["losses"] else "-" for name in names]
        table.add_row(row["phase"], *cells, row["model"])
    console.print(table)


def _losses(record: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in record.items() if key != "iteration" and value is not None}
