"""What the ranks of the tests of phases do: whole runs, stopped after any step and started again."""

from __future__ import annotations

import argparse
import io
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_ssu.commands.train import run as train
from megatron_ssu.errors import TrainingStopped
from megatron_ssu.methods.registry import read_run
from megatron_ssu.train.latest import checkpoints_folder, latest_iteration
from tests.dist.methods_work import stopped_after


def phases(file: str, folder: str, overrides: list[str], stops: list[int]) -> dict[str, Any]:
    """A run of a file with phases in `folder`, stopped after so many steps of each start; what it printed, its phases.json."""
    os.chdir(folder)
    text, run = io.StringIO(), read_run(file, overrides)
    console = Console(file=text, width=200)
    for steps in stops:
        with stopped_after(steps), suppress(TrainingStopped):
            train(run, argparse.Namespace(), console)
            raise AssertionError("the run was not stopped")
    train(run, argparse.Namespace(), console)
    table = json.loads((Path(run.checkpoint.directory) / "phases.json").read_text())
    begun = [checkpoints_folder(path) for path in sorted((Path(run.checkpoint.directory) / "phases").iterdir())]
    return {"said": text.getvalue(), "table": table, "iterations": [latest_iteration(path) for path in begun]}
