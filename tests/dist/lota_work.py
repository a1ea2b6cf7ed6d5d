"""What the ranks of the tests of LoTA's probe do: whole runs, some of them stopped or damaged."""

from __future__ import annotations

import io
import json
import os
import shutil
import weakref
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console

from megatron_ssu.commands import train
from megatron_ssu.engine.optimizer import owned
from megatron_ssu.engine.ranks import on_rank_zero
from megatron_ssu.errors import TrainingStopped, UserError
from megatron_ssu.methods.registry import read_run
from tests.dist.methods_work import SMALL


def losses(file: str, folder: str, overrides: list[str], name: str) -> dict[int, float]:
    """A run in runs/NAME of `folder`, not exported: its losses by iteration."""
    _run(file, folder, overrides, name)
    lines = [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
    return {line["iteration"]: line["loss"] for line in lines if "loss" in line}


def refused(file: str, folder: str, overrides: list[str], name: str, shield: str) -> str:
    """Why a run does not start in a new directory that has the shield file of the run `shield`; "" where it does."""
    _with_shield(folder, name, shield)
    try:
        _run(file, folder, overrides, name)
    except UserError as error:
        return str(error)
    return ""


def begun_again(file: str, folder: str, overrides: list[str], name: str, shield: str) -> dict[int, float]:
    """Losses of a run that finds the shield file of the run `shield` and no checkpoint."""
    _with_shield(folder, name, shield)
    return losses(file, folder, overrides, name)


def stopped(file: str, folder: str, overrides: list[str], name: str) -> tuple[int, str, bool]:
    """Status and line with which a run stops; whether it has a shield file."""
    try:
        _run(file, folder, overrides, name)
    except TrainingStopped as stop:
        return stop.status, str(stop), Path(f"runs/{name}/shield.safetensors").exists()
    raise AssertionError("the run was not stopped")


def left_of_the_probe(file: str, folder: str, overrides: list[str], name: str) -> dict[str, Any]:
    """What of the probe's is there, and which of its tensors have bytes, when the run's model is about to be built."""
    objects: dict[str, weakref.ref] = {}
    storages: dict[str, torch.UntypedStorage] = {}  # holding them keeps their bytes, if nobody frees these
    found: list[dict[str, Any]] = []
    probe, build = train.probe, train.build_model

    def noted(*args: Any, **kwargs: Any) -> Any:
        trainer = probe(*args, **kwargs)
        objects.update(trainer=weakref.ref(trainer), optimizer=weakref.ref(trainer.optimizer))
        for i, (ddp, chunk) in enumerate(zip(trainer.chunks, trainer.session.chunks, strict=True)):
            objects.update({f"ddp {i}": weakref.ref(ddp), f"chunk {i}": weakref.ref(chunk)})
            for j, buffer in enumerate(ddp.buffers):
                storages[f"gradients {i} {j}"] = buffer.grad_data.untyped_storage()
                storages[f"weights {i} {j}"] = buffer.param_data.untyped_storage()
        for i, part in enumerate(owned(trainer.optimizer)):
            storages.update({f"{key} {i}": state.untyped_storage() for key, state in part.states().items()})
        return trainer

    def built(*args: Any, **kwargs: Any) -> Any:
        found.append(
            {
                "objects": sorted(name for name, there in objects.items() if there() is not None),
                "bytes": {name: storage.nbytes() for name, storage in storages.items() if storage.nbytes()},
                "watched": len(objects) + len(storages),
            }
        )
        return build(*args, **kwargs)

    with mock.patch.object(train, "probe", noted), mock.patch.object(train, "build_model", built):
        _run(file, folder, overrides, name)
    (state,) = found
    return state


def _with_shield(folder: str, name: str, shield: str) -> None:
    os.chdir(folder)
    Path(f"runs/{name}").mkdir(parents=True, exist_ok=True)
    on_rank_zero(partial(shutil.copy, f"runs/{shield}/shield.safetensors", f"runs/{name}"))


def _run(file: str, folder: str, overrides: list[str], name: str) -> None:
    os.chdir(folder)
    places = [f"checkpoint.directory=runs/{name}", "checkpoint.export="]
    train.train_run(read_run(file, [*SMALL, *overrides, *places]), Console(file=io.StringIO(), width=200))
