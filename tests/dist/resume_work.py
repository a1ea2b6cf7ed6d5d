"""What the ranks of the resume and fault tests do: the training loop with checkpoints, on samples of random tokens."""

from __future__ import annotations

import errno
import io
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from megatron_ssu.config.schema import (
    OPTIMIZER_DEFAULTS,
    CheckpointSection,
    DataSection,
    LogSection,
    RunConfig,
    ScheduleSection,
    TrainSection,
)
from megatron_ssu.engine.checkpoint_io import owner_of_save_common
from megatron_ssu.engine.optimizer import members, steps
from megatron_ssu.engine.ranks import on_rank_zero
from megatron_ssu.errors import TrainingStopped
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.layout import take
from megatron_ssu.models.parallel_model import ParallelModel, open_model
from megatron_ssu.shield.shield_file import Shield, load_shield
from megatron_ssu.train import loop
from megatron_ssu.train import update_norms as updates
from megatron_ssu.train.checkpoints import Checkpoints, Progress
from megatron_ssu.train.identity import identity_of
from megatron_ssu.train.telemetry import Telemetry
from megatron_ssu.train.trainer import Step, Trainer
from megatron_ssu.train.watchdog import Watchdog
from tests.dist.work import GLOBAL_BATCH, LENGTH, RandomTokens, run_config


def make_run(
    model: str, parallel: dict[str, Any], directory: str, dtype: str = "fp32", ddp: dict | None = None, **options: Any
) -> RunConfig:
    """A run file's facts; `options`: fields of train and checkpoint, data_seed, lr."""
    checkpoint = {k: options.pop(k) for k in ("interval", "keep", "async_save") if k in options}
    optimizer = {**OPTIMIZER_DEFAULTS, "lr": options.pop("lr", 1e-3), "weight_decay": 0.1, "clip_grad": 0.5}
    data = DataSection(train=["a.jsonl"], sequence_length=LENGTH, loader_workers=0, seed=options.pop("data_seed", 1))
    train = {"iterations": 8, "micro_batch_size": 2, "global_batch_size": GLOBAL_BATCH, "eval_interval": 0} | options
    train.setdefault("schedule", ScheduleSection(warmup_fraction=0.2))
    return run_config(
        model,
        parallel,
        dtype,
        ddp,
        checkpoint=CheckpointSection(directory=directory, **{"interval": 4, **checkpoint}),
        data=data,
        train=TrainSection(optimizer=optimizer, **train),
        log=LogSection(interval=2, tensorboard=False),
    )


class Poisoned(RandomTokens):
    """Samples of which some give a loss that is not a number."""

    def __init__(self, bad: tuple[int, ...]) -> None:
        self._bad = bad

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(index)
        if index in self._bad:
            sample["loss_mask"] = torch.full_like(sample["loss_mask"], float("nan"))
        return sample


def train_run(
    run: RunConfig,
    shield_file: str | None = None,
    *,
    kick: tuple[int, int, int] | None = None,
    poison: tuple[int, ...] = (),
) -> dict[str, Any]:
    """Train from the newest checkpoint, if any; `kick`: (rank, iteration, signal) to send to oneself.

    Returns history (loss, grad norm, lr by iteration), this rank's weights and moments, its optimizer's count
    of steps, the console's text, how it stopped.
    """
    session = open_model(run)
    empty = Shield("none", "m", model_fingerprint(run.model.path), matrices={}, masks={})
    shield = load_shield(shield_file) if shield_file else empty
    trainer = Trainer(session, shield)
    identity = identity_of(run, trainer.method, shield, [])
    checkpoints, progress = Checkpoints(run.checkpoint.directory), Progress()
    latest = on_rank_zero(checkpoints.latest)
    if latest is not None:
        progress = checkpoints.load(latest, session, identity, trainer.optimizer_state, trainer.method)
        trainer.resume(progress)
    text, history, stopped = io.StringIO(), {}, None
    Path(run.checkpoint.directory).mkdir(parents=True, exist_ok=True)
    telemetry = Telemetry(run, Console(file=text), active=session.mesh.rank == 0, start=progress.iteration)
    step = trainer.step

    def noted(*args: Any, **kwargs: Any) -> Step:
        if kick is not None and kick[:2] == (session.mesh.rank, progress.iteration + 1):
            os.kill(os.getpid(), kick[2])
        done = step(*args, **kwargs)
        history[progress.iteration + 1] = (done.loss, done.grad_norm, done.lr)
        return done

    trainer.step = noted  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGUSR1)
    try:
        loop.train(
            trainer, identity, loop.Datasets(Poisoned(poison) if poison else RandomTokens()), telemetry, progress
        )
    except TrainingStopped as stop:
        stopped = (stop.status, str(stop))
    finally:
        telemetry.close()
    assert signal.getsignal(signal.SIGUSR1) == before
    trainer.gather_weights()
    return {
        "history": history,
        "stopped": stopped,
        "said": text.getvalue(),
        "weights": [p.detach().clone() for chunk in session.chunks for p in chunk.parameters()],
        "moments": moments(trainer),
        "steps": steps(trainer.optimizer),
    }


def moments(trainer: Trainer) -> list[torch.Tensor]:
    """Main weights, moments and counts of steps of this rank."""
    found = []
    for member in members(trainer.optimizer):
        for group in member.optimizer.param_groups:
            for param in group["params"]:
                found.append(param.detach().clone())
                found += [t.clone() for t in member.optimizer.state[param].values() if isinstance(t, torch.Tensor)]
    return found


def fill_disk(run: RunConfig, where: str, iteration: int) -> None:
    """Train; at `iteration` the write of one part of the checkpoint meets a full disk, on one rank."""
    from unittest import mock

    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from torch.distributed.checkpoint import filesystem

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patches = {
        "shard": mock.patch.object(filesystem_async, "_write_item", full),
        "common": mock.patch.object(owner_of_save_common(), "save_common", full),
        "metadata": mock.patch.object(filesystem.pickle, "dump", full),
    }
    guilty = torch.distributed.get_rank() == (1 if where == "shard" else 0)
    save = Checkpoints.save

    def saving(self: Checkpoints, *args: Any) -> Path:
        if not (guilty and args[1].iteration == iteration):
            return save(self, *args)
        with patches[where]:
            path = save(self, *args)
            if self.background:
                self.finish()
            return path

    with mock.patch.object(Checkpoints, "save", saving):
        train_run(run)


def compare_update_norms(run: RunConfig, shield_file: str | None) -> tuple[dict[str, float], dict[str, float]]:
    """Update norms of the third step as computed from the moments, and from the matrices' values before and after it."""
    session = open_model(run)
    empty = Shield("none", "m", model_fingerprint(run.model.path), matrices={}, masks={})
    trainer = Trainer(session, load_shield(shield_file) if shield_file else empty)
    batches = trainer.batches(RandomTokens(), 0)
    for _ in range(2):
        trainer.step(batches)
    before = _matrices(session)
    computed = trainer.step(batches, measure=True).update_norms
    trainer.gather_weights()
    squares = dict.fromkeys(updates.NAMES, 0.0)
    for (kind, copies, old), (_, _, new) in zip(before, _matrices(session), strict=True):
        squares[updates._kind(kind)] += (new - old).square().sum().item() / copies
    total = torch.tensor(list(squares.values()), dtype=torch.float64)
    torch.distributed.all_reduce(total)
    measured = dict(zip(squares, total.sqrt().tolist(), strict=True))
    return computed, {f"update_norm_{k}": v for k, v in measured.items() if v > 0}


def _matrices(session: ParallelModel) -> list[tuple[str, int, torch.Tensor]]:
    """Kind, number of replicas and float64 values of all matrices' parts that this rank answers for, padding left out."""
    mesh = session.mesh
    return [
        (
            piece.matrix.kind,
            mesh.expert_data if local.expert else mesh.data,
            take(local.param.detach().view(len(local.param), -1), piece).double(),
        )
        for local in session.layout
        if local.primary and (local.split is not None or local.expert or mesh.tensor_rank == 0)
        for piece in local.pieces
    ]


def hang(run: RunConfig, guilty: int) -> str:
    """One rank sleeps, until it is found out, where the others wait for it; what this rank's watchdog says."""
    said: list[str] = []
    watchdog = Watchdog(6.0, beat=1.5, end=said.append)
    with watchdog:
        watchdog.mark(3, "data")
        if torch.distributed.get_rank() == guilty:
            for _ in range(600):
                if said:
                    break
                time.sleep(0.1)
        torch.distributed.all_reduce(torch.zeros(1))
        watchdog.mark(4, "data")
    return said[0] if said else ""
