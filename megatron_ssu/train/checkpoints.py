"""Checkpoints of a run: which there are, when they are complete, which are kept, and resuming from one.

    <checkpoint.directory>/checkpoints/iter_0000500/     one checkpoint
    <checkpoint.directory>/checkpoints/latest            the number of the newest complete one
    <checkpoint.directory>/checkpoints/best              that of the best one, where evaluate.best says which; it is kept

Beside its storage's files a checkpoint has `digests.json`. It is written under a `.part` name and renamed when every rank has
finished; `latest` moves after that. Written in the background, training continues meanwhile: a thread writes a copy of the
state, taken at the time of the save.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_ssu.engine.ranks import gathered, is_rank_zero, on_all_ranks, on_rank_zero
from megatron_ssu.errors import UserError, named_line
from megatron_ssu.io.atomic import to_disk, written_aside
from megatron_ssu.methods.base import Method
from megatron_ssu.methods.training_facts import BLEND
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.parallel_model import ParallelModel
from megatron_ssu.train import sharded_state as states
from megatron_ssu.train.checksums import Digests, check_digests, digest_files, write_digests
from megatron_ssu.train.identity import METHOD, Identity, method_facts, model_facts
from megatron_ssu.train.latest import LATEST, best_iteration, checkpoint_path, checkpoints_folder, latest_iteration
from megatron_ssu.train.optimizer_state import OptimizerState
from megatron_ssu.train.storage import DistCheckpointing, Storage, WriteRequest

log = logging.getLogger(__name__)

POLL = 5.0  # seconds between two looks at the ranks' writers


@dataclass
class Progress:
    """Where a run is."""

    iteration: int = 0
    samples: int = 0  # of the training data, consumed
    skipped: int = 0  # steps skipped in a row, up to now
    blend: dict[str, Any] | None = None  # what continues the blend of the training data; see data/blend.py
    figures: dict[str, Any] | None = None  # what rules of the section `evaluate` remember: start, best, best_iteration


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    iteration: int
    part: Path
    request: WriteRequest
    thread: threading.Thread | None = None
    steps: int = 0  # that the writer got done: tensors written, blocks digested
    digests: Digests = field(default_factory=dict)  # of the files that this rank wrote

    def start(self) -> None:
        """Write this rank's files in a thread of their own, and digest them."""
        write = self.request.write
        if write is None:
            return

        def work() -> None:
            try:
                self.digests = digest_files(write(self._advance), self._advance)
            except BaseException as error:  # a thread's error is raised where the save is finished
                self.request.errors.append(error)

        self.thread = threading.Thread(target=work, name=f"checkpoint-{self.iteration}", daemon=True)
        self.thread.start()

    def _advance(self) -> None:
        self.steps += 1

    @property
    def busy(self) -> bool:
        """Whether this rank's writer is still at work."""
        return self.thread is not None and self.thread.is_alive()


class Checkpoints:
    """The checkpoints of one run directory, of which the newest `keep` stay (None: all), written by `storage`."""

    def __init__(
        self,
        directory: str | Path,
        keep: int | None = None,
        *,
        background: bool = False,
        storage: Storage | None = None,
    ) -> None:
        self.folder, self.keep, self.background = checkpoints_folder(directory), keep, background
        self.storage: Storage = storage or DistCheckpointing()
        self.mark: Callable[[], None] = lambda: None  # called while a save makes progress
        self._pending: _Pending | None = None

    def path(self, iteration: int) -> Path:
        return checkpoint_path(self.folder, iteration)

    def latest(self) -> int | None:
        """Iteration of the newest complete checkpoint, or None. Raises UserError for a damaged `latest`."""
        return latest_iteration(self.folder)

    def clean(self) -> None:
        """Remove what an interrupted save left behind. On rank 0."""
        for part in self.folder.glob("iter_*.part"):
            log.warning("%s: a checkpoint that was not finished; removed", part)
            shutil.rmtree(part, ignore_errors=True)
        for part in self.folder.glob(f".{LATEST}.*.part"):
            part.unlink(missing_ok=True)

    def save(
        self,
        session: ParallelModel,
        progress: Progress,
        identity: Identity,
        optimizer: OptimizerState,
        method: Method,
    ) -> Path:
        """Write a checkpoint, or begin to in the background; collective.

        Raises UserError on all ranks where one cannot write; the checkpoint before stays whole.
        """
        self.finish()
        return self._write(session, lambda: states.sharded_state(session, optimizer, method), progress, identity)

    def save_weights(self, session: ParallelModel) -> Path:
        """Write the model's weights alone, as iteration 0: for export, not to resume from; collective."""
        identity = on_rank_zero(lambda: _model_identity(session))
        return self._write(session, lambda: states.model_state(session), Progress(), identity)

    def _write(
        self, session: ParallelModel, state_of: Callable[[], dict[str, Any]], progress: Progress, identity: Identity
    ) -> Path:
        final = self.path(progress.iteration)
        part = final.with_name(final.name + ".part")

        def begin() -> None:
            try:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
            except OSError as error:
                raise self._unwritten(part, error) from error

        on_rank_zero(begin)
        state = state_of()
        state["progress"] = asdict(progress)
        state["identity"] = identity.facts
        state["mesh"] = states.mesh_facts(session)
        request = self.storage.write(state, part, background=self.background)
        self._pending = _Pending(progress.iteration, part, request)
        self._pending.start()
        if not self.background:
            self.finish()
        return final

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is being written in the background; the same on all ranks."""
        return self._pending is not None

    @property
    def busy(self) -> bool:
        """Whether this rank's writer is still at work."""
        return self._pending is not None and self._pending.busy

    def _wait(self, pending: _Pending) -> None:
        """Until every rank's writer has ended; marks progress as long as one of them makes some. Collective."""
        seen = -1
        while True:
            if pending.thread is not None:
                pending.thread.join(POLL)
            reports = gathered((pending.busy, pending.steps))
            done = sum(steps for _, steps in reports)
            if done > seen:
                self.mark()
            seen = done
            if not any(busy for busy, _ in reports):
                return

    def finish(self) -> Path | None:
        """Wait for a checkpoint in the background and publish it; collective. Its path, or None if there was none.

        Raises UserError on all ranks where one could not write.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        self._wait(pending)

        def wrote() -> None:
            if pending.request.errors:
                raise self._unwritten(pending.part, pending.request.errors[0])

        def finalize() -> None:
            try:
                pending.request.finalize()
            except Exception as error:
                raise self._unwritten(pending.part, error) from error

        final = self.path(pending.iteration)
        try:
            on_all_ranks(wrote)
            on_all_ranks(finalize)
            digests = gathered(pending.digests)
            on_rank_zero(lambda: self._publish(pending.part, final, pending.iteration, digests))
        except UserError:
            if is_rank_zero():
                shutil.rmtree(pending.part, ignore_errors=True)
            raise
        return final

    def _unwritten(self, part: Path, error: BaseException) -> UserError:
        """The one line for a checkpoint that could not be written."""
        reason = _reason(error)
        last = self.latest()
        kept = (
            f"the last good checkpoint, {self.path(last)}, is whole" if last is not None else "there is none before it"
        )
        return UserError(f"{part}: cannot be written: {reason}; {kept}; make room and start again")

    def _publish(self, part: Path, final: Path, iteration: int, digests: list[Digests]) -> None:
        try:
            self.storage.complete(part)
            write_digests(part, digests)
            for file in (*part.iterdir(), part):
                to_disk(file)
            if final.exists():  # left over from a run that was rolled back: `latest` names an earlier one
                shutil.rmtree(final)
            os.replace(part, final)
            with written_aside(self.folder / LATEST) as fresh:
                fresh.write_text(f"{iteration}\n")
            to_disk(self.folder)
        except OSError as error:
            raise self._unwritten(part, error) from error
        if self.keep is not None:
            found = sorted(p for p in self.folder.iterdir() if re.fullmatch(r"iter_\d+", p.name) and p <= final)
            best = best_iteration(self.folder)
            for old in found[: -self.keep]:
                if best is not None and old == self.path(best):
                    continue
                shutil.rmtree(old, ignore_errors=True)

    def load(
        self,
        iteration: int,
        session: ParallelModel,
        identity: Identity,
        optimizer: OptimizerState,
        method: Method,
    ) -> Progress:
        """Load model, optimizer and RNG from a checkpoint of any mesh; collective.

        Raises:
            UserError: the checkpoint is damaged, or belongs to another run.
        """
        path = self.path(iteration)
        common = on_all_ranks(lambda: self._checked(path))
        on_all_ranks(lambda: identity.compare(common["identity"], path, free=BLEND))
        states.load_model(session, method, self.storage, path)
        optimizer.compact.read()
        same_mesh = common["mesh"] == states.mesh_facts(session)
        states.load_training(session, optimizer, method, self.storage, path, with_rng=same_mesh)
        return Progress(**common["progress"])

    def load_optimizer(self, iteration: int, session: ParallelModel, optimizer: OptimizerState, method: Method) -> None:
        """Load a checkpoint's optimizer state alone, under the same shield; collective. Raises UserError for a damaged one."""
        path = self.path(iteration)
        on_all_ranks(lambda: self._checked(path))
        states.load_training(session, optimizer, method, self.storage, path, with_rng=False)

    def read_common(self, iteration: int) -> dict[str, Any]:
        """A checkpoint's progress, identity and mesh, without its tensors. Raises UserError where it is damaged."""
        return self.storage.read_common(self.path(iteration))

    def _checked(self, path: Path) -> dict[str, Any]:
        """A checkpoint's common part, when this rank's part of its files is whole. Raises UserError."""
        if not path.is_dir():
            raise UserError(f"{path}: no such checkpoint; `latest` beside it names the newest")
        check_digests(path, dist.get_rank(), dist.get_world_size())
        return self.storage.read_common(path)

    def load_weights(self, iteration: int, session: ParallelModel, method: Method) -> dict[str, Any]:
        """Load the weights of the model and of the method alone; the checkpoint's common part. Collective.

        Raises UserError where they are weights of another model than the session's, in another precision, or of another method.
        """
        path = self.path(iteration)
        common = on_all_ranks(lambda: self._checked(path))
        saved = common["identity"]

        def compare() -> None:
            _model_identity(session).compare_model(saved, path)
            if METHOD in saved:  # else weights that no method has trained
                Identity(method_facts(method)).compare_method(saved, path)

        on_rank_zero(compare)
        states.load_model(session, method, self.storage, path)
        return common


def _model_identity(session: ParallelModel) -> Identity:
    return Identity(model_facts(session.run, model_fingerprint(session.source.path)))


def _reason(error: BaseException | None) -> str:
    """The operating system's words, wherever in the chain of causes they are."""
    found, text = error, named_line(error) if error is not None else ""
    while found is not None:
        if isinstance(found, OSError) and found.strerror:
            return found.strerror
        for failure in getattr(found, "failures", {}).values():
            return _reason(failure[0])
        found = found.__cause__ or found.__context__
    if "unexpected pos" in text:  # torch's archive writer does not say why a write was short
        return "not all of it was written"
    return os.strerror(errno.ENOSPC) if "Errno 28" in text else text
