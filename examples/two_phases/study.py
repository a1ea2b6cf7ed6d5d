"""Does English ability survive a second phase in another language? Two first phases, ten ways through the second.

    phase 1   similar (the questions of phase 2, in English) or dissimilar (exercises with words and letters)
    phase 2   the questions in the target language, by each of METHODS

Everything starts from one base model, that of base.yaml. A seed draws the order of data, answers, layers and adapters. Run
files, runs and models are kept in the output folder; started again, the study goes on with what is missing.

  python examples/two_phases/study.py [--output study_out] [--seeds 3] [--jobs 2]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from abilities import abilities
from steps import PYTHON, TRAINER
from study_report import write_report

HERE = Path(__file__).resolve().parent
ENGLISH = ("similar", "dissimilar")
BASE = "hf/base"
COUNTERPARTS = "world/counterparts.jsonl"


def _generative(fraction: float) -> dict[str, Any]:
    asked = {"prompts": COUNTERPARTS, "samples": 1200, "max_new_tokens": 32, "batch_size": 100}
    return {"fraction": fraction, "generate": asked}


RATE, LORA_RATE = 2.0e-3, 5.0e-3  # of the second phase; adapters learn little at the rate of full weights
SSU = {"method": {"name": "ssu"}, "shield": {"ratio": 0.5}}
METHODS: dict[str, dict[str, Any]] = {
    "none": {"method": {"name": "none"}},
    "LF_H1": {"method": {"name": "layers", "layers": {"choose": "random", "fraction": 0.5}}},
    "LF_H2": {"method": {"name": "layers", "layers": {"choose": "changed", "fraction": 0.5, "before": BASE}}},
    "Spectrum": {"method": {"name": "layers", "layers": {"choose": "spectrum", "fraction": 0.5}}},
    "GR_5": {"method": {"name": "none"}, "replay": _generative(0.05)},
    "GR_10": {"method": {"name": "none"}, "replay": _generative(0.1)},
    "ER_10": {"method": {"name": "none"}, "replay": {"fraction": 0.1, "path": COUNTERPARTS}},
    "LoRA": {"method": {"name": "lora", "lora": {"rank": 32, "alpha": 32}}, "lr": LORA_RATE},
    "SSU": SSU,
    "SSU + GR_10": {**SSU, "replay": _generative(0.1)},
}
ALONE = "language alone"  # phase 2 without a first phase: the other side of MPD


@dataclass(frozen=True)
class Cell:
    """One training run of the study; `method` is None for the first phase, and `english` for the second one without a first."""

    english: str | None
    seed: int
    method: str | None = None

    @property
    def name(self) -> str:
        """Names run file, run and model."""
        parts = (self.english or "alone", self.method or "", str(self.seed))
        return "-".join(part.replace(" + ", "_") for part in parts if part)

    @property
    def model(self) -> str:
        """Where its export is, from the output folder."""
        return f"hf/{self.name}"

    def run_file(self) -> dict[str, Any]:
        """The run file's content."""
        changes: dict[str, Any] = {"method": {"name": "none"}}
        if self.english and self.method:
            changes = json.loads(json.dumps(METHODS[self.method]))
        rate = changes.pop("lr", RATE)
        first = self.english is not None and self.method is None
        seeded(changes, self.seed)
        if "shield" in changes:
            changes["shield"]["calibration"] = {
                "path": f"world/{self.english}.jsonl",
                "samples": 500,
                "sequence_length": 128,
                "micro_batch_size": 8,
            }
        return {
            "model": {"path": Cell(self.english, self.seed).model if self.method else BASE},
            "precision": {"dtype": "fp32"},
            "data": {
                "train": f"world/{self.english}.jsonl" if first else "world/language.jsonl",
                "loss_on": "answers",
                "packing": "documents",
                "weights_in": "tokens",
                "sequence_length": 128,
                "loader_workers": 0,
                "seed": 1233 + self.seed,  # 1234, the default, and on
            },
            "train": {
                "seed": self.seed,
                "iterations": 300 if first else 250,
                "micro_batch_size": 16,
                "global_batch_size": 16,
                "eval_interval": 0,
                "optimizer": {"lr": 3.0e-3 if first else rate, "adam_beta2": 0.95},
            },
            "log": {"interval": 50, "tensorboard": False},
            "checkpoint": {"directory": f"runs/{self.name}", "interval": 0, "export": self.model},
            **changes,
        }


def seeded(changes: dict[str, Any], seed: int) -> None:
    """Give the seed to all that is drawn beside the data's order."""
    method = changes["method"]
    if method["name"] == "lora":
        method["lora"]["seed"] = seed
    if method.get("layers", {}).get("choose") == "random":
        method["layers"]["seed"] = seed
    if "generate" in changes.get("replay", {}):
        changes["replay"]["generate"]["seed"] = seed


def first_cells(seeds: Iterable[int]) -> list[Cell]:
    """What starts from the base model: the first phases, and the second one alone."""
    return [Cell(english, seed) for seed in seeds for english in (*ENGLISH, None)]


def second_cells(seeds: Iterable[int]) -> list[Cell]:
    """What starts from a first phase."""
    return [Cell(english, seed, method) for seed in seeds for english in ENGLISH for method in METHODS]


class Study:
    """Runs commands in the output folder, `jobs` at a time."""

    def __init__(self, output: Path, jobs: int, console: Console) -> None:
        self.output = output
        self._jobs = jobs
        self._console = console
        self._variables = {
            **os.environ,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "TOKENIZERS_PARALLELISM": "false",
        }

    def command(self, *arguments: str, log: str) -> None:
        """Run a command, its output in logs/LOG; exits with a line where it fails."""
        path = self.output / "logs" / log
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            done = subprocess.run(
                arguments, cwd=self.output, env=self._variables, stdout=file, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode:
            sys.exit(f"{' '.join(arguments)}: exit status {done.returncode}, see {path}")

    def start(self) -> None:
        """World, untrained model and base model."""
        if not (self.output / "hf/untrained/config.json").is_file():
            self.command(PYTHON, str(HERE / "tasks.py"), "--output", "world", log="world")
            make = str(HERE.parent / "demo" / "make_model.py")
            self.command(PYTHON, make, "--world", "world", "--output", "hf/untrained", log="untrained")
        if not (self.output / BASE / "config.json").is_file():
            shutil.copyfile(HERE / "base.yaml", self.output / "base.yaml")
            self.command(*TRAINER, "train", "base.yaml", log="base")

    def train(self, cells: list[Cell], title: str) -> None:
        """Train all cells that have no model yet."""
        left = [cell for cell in cells if not (self.output / cell.model / "config.json").is_file()]
        with Progress(console=self._console) as progress, ThreadPoolExecutor(self._jobs) as pool:
            task = progress.add_task(title, total=len(cells), completed=len(cells) - len(left))
            for _ in pool.map(self._train, left):
                progress.advance(task)

    def _train(self, cell: Cell) -> None:
        run_file = f"{cell.name}.yaml"
        (self.output / run_file).write_text(yaml.safe_dump(cell.run_file(), sort_keys=False))
        self.command(*TRAINER, "train", run_file, log=cell.name)

    def json_of(self, name: str, *arguments: str) -> dict[str, Any]:
        """What a command writes with --json."""
        self.command(*TRAINER, *arguments, "--json", f"{name}.json", log=name)
        return json.loads((self.output / f"{name}.json").read_text())

    def similarity(self) -> dict[str, dict[str, float]]:
        """DES between the instructions of either first phase and of the second, as the base model embeds them."""
        sets = [f"world/{name}.jsonl" for name in ("language", *ENGLISH)]
        pairs = self.json_of("similarity", "similarity", *sets, "--model", BASE)["pairs"]
        found = {(pair["first"], pair["second"]): pair for pair in pairs}
        return {
            english: {key: found[sets[0], f"world/{english}.jsonl"][key] for key in ("value", "spread")}
            for english in ENGLISH
        }

    def apart(self, seeds: Iterable[int]) -> dict[str, list[dict[str, Any]]]:
        """MPD: by seed, how far a model of the first phase is from one that the base became by the second alone."""
        found: dict[str, list[dict[str, Any]]] = {english: [] for english in ENGLISH}
        for seed in seeds:
            alone = Cell(None, seed).model
            models = {Cell(english, seed).model: english for english in ENGLISH}
            pairs = self.json_of(f"apart-{seed}", "compare", BASE, alone, *models)["pairs"]
            for pair in pairs:
                if pair["first"] == alone:
                    found[models[pair["second"]]].append(pair)
        return found

    def measures(self, english: str, seed: int) -> dict[str, dict[str, Any]]:
        """By method, and for the first phase itself: both abilities, and the drift from the first phase on held-out English."""
        first = Cell(english, seed)
        cells = {method: Cell(english, seed, method) for method in METHODS}
        compared = self.json_of(
            f"compare-{first.name}",
            *("compare", first.model, *(cell.model for cell in cells.values())),
            *("--text", f"world/heldout_{english}.jsonl", "--sequence-length", "128", "--samples", "150"),
            *("--micro-batch-size", "16"),
        )
        drift = {model["path"]: model for model in compared["models"]}
        found: dict[str, dict[str, Any]] = {"after phase 1": self._abilities(first)}
        for method, cell in cells.items():
            found[method] = {**self._abilities(cell), "drift": drift[cell.model]}
        return found

    def _abilities(self, cell: Cell) -> dict[str, float]:
        return abilities(self.output / cell.model, self.output / "world", cell.english or "similar")


def run(study: Study, seeds: list[int]) -> Mapping[str, Any]:
    """Train and measure everything."""
    study.start()
    study.train(first_cells(seeds), "first phases")
    study.train(second_cells(seeds), "second phases")
    return {
        "seeds": seeds,
        "similarity": study.similarity(),
        "apart": study.apart(seeds),
        "models": {english: [study.measures(english, seed) for seed in seeds] for english in ENGLISH},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Repeat the study of two phases: about an hour on two cores.")
    parser.add_argument(
        "--output", type=Path, default=Path("study_out"), help="folder for everything (default study_out)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of every cell (default 3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each (default 2)")
    args = parser.parse_args()
    console = Console()
    args.output.mkdir(parents=True, exist_ok=True)
    results = run(Study(args.output, args.jobs, console), list(range(1, args.seeds + 1)))
    write_report(args.output, results, console)


if __name__ == "__main__":
    main()
