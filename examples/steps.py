"""Commands run one after the other in an output folder, each shown before it runs: what the examples' run.py are made of."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

PYTHON = sys.executable
RANKS = 2
TRAINER = [PYTHON, "-m", "megatron_ssu"]
RANKED = [PYTHON, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "-m", "megatron_ssu"]


@dataclass(frozen=True)
class Step:
    """One command, run in the output folder."""

    title: str
    command: list[str]


@dataclass(frozen=True)
class Example:
    """An example's commands, the run files that it copies into its folder, and what the commands make there.

    `mark` is a file that says that the folder is the example's own and may be emptied by the next one; `result` is named last.
    """

    name: str
    mark: str
    run_files: Sequence[Path]
    made: Sequence[str]
    steps: Sequence[Step]
    result: str


def make_output(output: Path, example: Example) -> None:
    """A folder with the run files in it and nothing left of an earlier run; exits where it holds other things."""
    if output.exists() and not output.is_dir():
        sys.exit(f"{output} is a file; name another folder with --output")
    if output.is_dir() and any(output.iterdir()) and not (output / example.mark).is_file():
        sys.exit(f"{output} is not empty and not an earlier {example.name}'s; name another folder with --output")
    output.mkdir(parents=True, exist_ok=True)
    (output / example.mark).touch()
    for name in (*example.made, *(file.name for file in example.run_files)):
        path = output / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for file in example.run_files:
        shutil.copyfile(file, output / file.name)


def environment(console: Console) -> dict[str, str]:
    """One thread per rank; and the CPU where there are not enough GPUs for every rank to have its own."""
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if 0 < torch.cuda.device_count() < RANKS:
        console.print(f"The {RANKS} ranks find {torch.cuda.device_count()} GPU: they run on the CPU.")
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


def run(output: Path, example: Example) -> None:
    """Run all steps; exits with the status of one that fails."""
    console = Console(highlight=False)
    make_output(output, example)
    variables = environment(console)
    begin = time.monotonic()
    for number, step in enumerate(example.steps, 1):
        console.rule(f"[bold]{number}/{len(example.steps)} {step.title}", align="left")
        console.print(f"[dim]{escape('$ ' + shlex.join(step.command))}", soft_wrap=True)
        start = time.monotonic()
        status = subprocess.run(step.command, cwd=output, env=variables, check=False).returncode
        if status:
            console.print(f"[red]step {number} ({step.title}) failed with exit status {status}")
            sys.exit(status if status > 0 else 128 - status)
        console.print(f"[dim]{time.monotonic() - start:.0f} s")
    console.print(f"[bold]Done in {time.monotonic() - begin:.0f} s.[/] {output / example.result}", soft_wrap=True)


def output_argument(description: str, default: str) -> Path:
    """--output of the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=Path(default), help=f"folder for everything (default {default})")
    return parser.parse_args().output
