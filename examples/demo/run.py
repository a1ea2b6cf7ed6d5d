"""The whole demo: a world, a source model, two adaptations, a proof, a table and a plot.

Every step is a command that you could type yourself in the output folder; it is shown before it runs.

  python examples/demo/run.py [--output demo_out]
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

HERE = Path(__file__).resolve().parent
RUN_FILES = ("source.yaml", "fft.yaml", "ssu.yaml")
MADE = ("world", "hf", "runs", *RUN_FILES, "results.json", "forgetting.png")
MARK = ".megatron-ssu-demo"  # says that the folder is a demo's own and may be emptied by the next one
RANKS = 2


@dataclass(frozen=True)
class Step:
    """One command, run in the output folder."""

    title: str
    command: list[str]


def steps() -> list[Step]:
    """The demo's commands in their order."""
    python = sys.executable
    trainer = [python, "-m", "megatron_ssu"]
    train = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "-m", "megatron_ssu"]

    def script(name: str, *arguments: str) -> list[str]:
        return [python, str(HERE / name), *arguments]

    return [
        Step("Make the bilingual world", script("world.py", "--output", "world")),
        Step(
            "Make a tokenizer and an untrained model",
            script("make_model.py", "--world", "world", "--output", "hf/start"),
        ),
        Step("Train the source model (data-parallel)", [*train, "train", "source.yaml"]),
        Step("Adapt it by full fine-tuning (tensor-parallel)", [*train, "train", "fft.yaml"]),
        Step("Adapt it with Source-Shielded Updates (tensor-parallel)", [*train, "train", "ssu.yaml"]),
        Step(
            "Verify that no shielded bit moved",
            [
                *trainer,
                "verify",
                "--source",
                "hf/source",
                "--adapted",
                "hf/ssu",
                "--shield",
                "runs/ssu/shield.safetensors",
            ],
        ),
        Step(
            "Evaluate with plain transformers",
            script(
                "evaluate.py",
                "--world",
                "world",
                "--output",
                "results.json",
                "before=hf/source",
                "FFT=hf/fft",
                "SSU=hf/ssu",
            ),
        ),
        Step(
            "Report",
            script(
                "report.py",
                *("--results", "results.json", "--run", "FFT=runs/fft", "--run", "SSU=runs/ssu"),
                *("--plot", "forgetting.png"),
            ),
        ),
    ]


def make_output(output: Path) -> None:
    """A folder with the run files in it and nothing left of an earlier demo; exits where it holds other things."""
    if output.exists() and not output.is_dir():
        sys.exit(f"{output} is a file; name another folder with --output")
    if output.is_dir() and any(output.iterdir()) and not (output / MARK).is_file():
        sys.exit(f"{output} is not empty and not an earlier demo's; name another folder with --output")
    output.mkdir(parents=True, exist_ok=True)
    (output / MARK).touch()
    for name in MADE:
        path = output / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for name in RUN_FILES:
        shutil.copyfile(HERE / name, output / name)


def environment(console: Console) -> dict[str, str]:
    """One thread per rank; and the CPU where there are not enough GPUs for every rank to have its own."""
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if 0 < torch.cuda.device_count() < RANKS:
        console.print(f"The demo has {RANKS} ranks and finds {torch.cuda.device_count()} GPU: it runs on the CPU.")
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the demo: about five minutes on two cores.")
    parser.add_argument(
        "--output", type=Path, default=Path("demo_out"), help="folder for everything (default demo_out)"
    )
    args = parser.parse_args()
    console = Console(highlight=False)
    make_output(args.output)
    variables = environment(console)
    begin = time.monotonic()
    plan = steps()
    for number, step in enumerate(plan, 1):
        console.rule(f"[bold]{number}/{len(plan)} {step.title}", align="left")
        console.print(f"[dim]{escape('$ ' + shlex.join(step.command))}", soft_wrap=True)
        start = time.monotonic()
        status = subprocess.run(step.command, cwd=args.output, env=variables, check=False).returncode
        if status:
            console.print(f"[red]step {number} ({step.title}) failed with exit status {status}")
            sys.exit(status if status > 0 else 128 - status)
        console.print(f"[dim]{time.monotonic() - start:.0f} s")
    console.print(
        f"[bold]Done in {time.monotonic() - begin:.0f} s.[/] Plot: {args.output / 'forgetting.png'}", soft_wrap=True
    )


if __name__ == "__main__":
    main()
