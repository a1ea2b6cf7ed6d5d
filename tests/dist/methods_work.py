"""What the ranks of the tests of methods do: whole runs of the examples, stopped and resumed."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console

from megatron_ssu.commands.export import export
from megatron_ssu.commands.train import probe, train_run
from megatron_ssu.config.schema import (
    OPTIMIZER_DEFAULTS,
    CheckpointSection,
    DataSection,
    MethodSection,
    RunConfig,
    ScheduleSection,
    TrainSection,
)
from megatron_ssu.errors import TrainingStopped
from megatron_ssu.methods.base import Job
from megatron_ssu.methods.registry import METHODS, method_of, read_run
from megatron_ssu.models.parallel_model import build_model, open_model
from megatron_ssu.train.loop import Datasets
from megatron_ssu.train.trainer import Step, Trainer
from tests.dist.work import GLOBAL_BATCH, LENGTH, RandomTokens, run_config

STEPS, STOP = 6, 3
SMALL = [
    *(f"train.iterations={STEPS}", "train.eval_interval=0", "train.eval_batches=1", "checkpoint.interval=50"),
    *("data.sequence_length=32", "train.global_batch_size=8", "train.micro_batch_size=2"),
]


@contextmanager
def stopped_after(iteration: int) -> Iterator[None]:
    """Within it a run is asked to stop by SIGUSR1 during its `iteration`-th step."""
    step, taken = Trainer.step, 0

    def noted(self: Trainer, *args: Any, **kwargs: Any) -> Step:
        nonlocal taken
        if kwargs or len(args) > 1:  # a step of the run's loop, not of a probe
            taken += 1
            if taken == iteration:
                os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, *args, **kwargs)

    with mock.patch.object(Trainer, "step", noted):
        yield


def whole_run(file: str, folder: str, overrides: list[str], name: str, *, interrupted: bool) -> dict[str, Any]:
    """A run of an example in `folder`, in runs/NAME and exported to out/NAME; losses by iteration and what was printed."""
    os.chdir(folder)
    text = io.StringIO()
    console = Console(file=text, width=200)
    places = [f"checkpoint.directory=runs/{name}", f"checkpoint.export=out/{name}"]
    run = read_run(file, [*SMALL, *overrides, *places])
    if interrupted:
        with stopped_after(STOP), suppress(TrainingStopped):
            train_run(run, console)
            raise AssertionError("the run was not stopped")
        assert not Path(f"out/{name}").exists()
    train_run(run, console)
    lines = [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
    losses = {line["iteration"]: line["loss"] for line in lines if "loss" in line}
    norms = {line["iteration"]: line["grad_norm"] for line in lines if "loss" in line}
    return {"losses": losses, "norms": norms, "said": text.getvalue()}


def cycle(file: str, folder: str, overrides: list[str], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same run twice: at one go, and stopped and resumed."""
    straight = whole_run(file, folder, overrides, name, interrupted=False)
    return straight, whole_run(file, folder, overrides, f"{name}-resumed", interrupted=True)


def export_again(file: str, folder: str, overrides: list[str], name: str, target: str) -> None:
    """Export the newest checkpoint of runs/NAME to out/TARGET by the command."""
    os.chdir(folder)
    run = read_run(file, [*SMALL, *overrides, f"checkpoint.directory=runs/{name}"])
    export(run, f"out/{target}", None, Console(file=io.StringIO()))


def method_steps(model: str, parallel: dict[str, Any], steps: int, name: str, **options: Any) -> dict[str, Any]:
    """Steps of a method on random tokens in fp32: [loss, grad norm, lr] by step."""
    run = _tokens_run(model, parallel, steps, name, options)
    trained, method = open_model(run), method_of(run)
    job = Job(
        trained,
        False,
        partial(probe, Datasets(RandomTokens())),
        partial(build_model, run, trained.source, trained.mesh),
    )
    del trained
    shield = method.prepare(job)
    trainer = Trainer(job.model, shield, method)
    batches = trainer.batches(RandomTokens(), 0)
    taken = [trainer.step(batches) for _ in range(steps)]
    return {"history": [(step.loss, step.grad_norm, step.lr) for step in taken]}


def _tokens_run(model: str, parallel: dict[str, Any], steps: int, name: str, options: dict[str, Any]) -> RunConfig:
    kind = next(method for method in METHODS if method.name == name)
    return run_config(
        model,
        parallel,
        checkpoint=CheckpointSection(directory=options.pop("directory", "unused")),
        method=MethodSection(name=name, options={name: kind.Options(**options)}),
        data=DataSection(sequence_length=LENGTH, loader_workers=0),
        train=TrainSection(
            iterations=steps,
            micro_batch_size=2,
            global_batch_size=GLOBAL_BATCH,
            schedule=ScheduleSection(warmup_fraction=0.1),
            optimizer={**OPTIMIZER_DEFAULTS, "lr": 1e-3, "weight_decay": 0.1, "clip_grad": 0.5},
        ),
    )
