"""Whether a run may resume from what its directory and its export's place hold; checked before anything is made or loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_ssu.config.schema import RunConfig
from megatron_ssu.errors import UserError
from megatron_ssu.io.atomic import check_target
from megatron_ssu.methods.base import Method
from megatron_ssu.methods.training_facts import DOCUMENTS
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.source import Source
from megatron_ssu.shield.shield_file import Shield
from megatron_ssu.train.checkpoints import Checkpoints, Progress
from megatron_ssu.train.checksums import digest_of_all
from megatron_ssu.train.export_record import ExportRecord, read_record, record_of
from megatron_ssu.train.identity import Identity, identity_of, method_facts


def newest(run: RunConfig, method: Method, checkpoints: Checkpoints) -> int | None:
    """The checkpoint to resume from, or None.

    Raises UserError where there is one and the run is not to resume from it.
    """
    latest = checkpoints.latest()
    if latest is None:
        return None
    path, train = checkpoints.path(latest), run.train
    if not run.checkpoint.resume:
        raise UserError(
            f"checkpoint.resume: false, and {path} is there; choose another checkpoint.directory, or remove the checkpoints"
        )
    if train.iterations < latest:
        raise UserError(
            f"train.iterations: {train.iterations} is less than {latest}, the iteration of {path}; raise it, or write an "
            f"older checkpoint's number into {checkpoints.folder / 'latest'}"
        )
    common = checkpoints.read_common(latest)
    if "optimizer" not in common:
        raise UserError(f"{path}: it holds weights alone, for `export`; train in another checkpoint.directory")
    if "steps" not in common["optimizer"] or "blend" not in common["progress"]:
        raise UserError(
            f"{path}: it was written by an earlier version and cannot be resumed; go on with that version, or "
            "`export` it and start from there in another checkpoint.directory"
        )
    Identity(method_facts(method)).compare_method(common["identity"], path)
    return latest


def may_be_exported(run: RunConfig, latest: int | None) -> bool:
    """Whether the place of the export holds one that may be this run's, which then has ended.

    Raises UserError where something else is there, or the export could not be written.
    """
    if run.checkpoint.export is None:
        return False
    target = Path(run.checkpoint.export)
    if latest == run.train.iterations and target.is_dir() and read_record(target) is not None:
        return True
    check_target(run.checkpoint.export, "checkpoint.export")
    return False


def check_exported(
    run: RunConfig,
    method: Method,
    source: Source,
    checkpoints: Checkpoints,
    shield_of: Callable[[], Shield | None],
    digests_of: Callable[[Sequence[str]], Sequence[str]],
) -> None:
    """Returns where the export at checkpoint.export is that of the run's last checkpoint, so that nothing is left to do.

    `shield_of`: the run's shield, where it can be had without scoring; `digests_of`: those of its training documents, given
    the checkpoint's, which stand for datasets that were removed.
    Raises UserError where the run file is not the checkpoint's any more, or the export is another's.
    """
    path = checkpoints.path(run.train.iterations)
    common = checkpoints.read_common(run.train.iterations)
    shield = shield_of()
    if shield is None:
        raise UserError(f"{checkpoints.folder.parent}: scores and shield are gone; restore them, or export elsewhere")
    identity_of(run, method, shield, digests_of(common["identity"][DOCUMENTS])).compare(common["identity"], path)
    progress = Progress(**common["progress"])
    expected = checkpoint_record(source, path, common["identity"], progress)
    found = read_record(Path(run.checkpoint.export or ""))
    if found != expected:
        raise UserError(
            f"checkpoint.export: {run.checkpoint.export} holds another export ({found}; this run's is {expected}) and is not "
            "overwritten; name another directory or remove it"
        )


def checkpoint_record(source: Source, path: Path, facts: dict[str, Any], progress: Progress) -> ExportRecord:
    """The record of an export of the checkpoint at `path`, which has these identity facts and this progress."""
    fingerprint, files = model_fingerprint(source.path), digest_of_all(path)
    return record_of(source.name, fingerprint, facts, progress.iteration, files)
