"""English and multilingual ability of models: exact match of greedy answers to held-out instructions, in plain transformers.

python abilities.py --world DIR --english similar --output FILE.json NAME=HF_DIR [NAME=HF_DIR ...]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from megatron_ssu.io.atomic import write_text

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
from evaluate import chat_matches, read_jsonl

LIMIT = 32  # tokens, more than the longest answer


def abilities(directory: Path, world: Path, english: str) -> dict[str, float]:
    """EA on the held-out instructions of the English set `english`, MA on those in the target language, and their mean."""
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).float().eval()
    found = {}
    for name, part in (("EA", english), ("MA", "language")):
        matches = chat_matches(model, tokenizer, read_jsonl(world / f"heldout_{part}.jsonl"), LIMIT)
        found[name] = sum(matches.values()) / len(matches)
    return {**found, "mean": (found["EA"] + found["MA"]) / 2}


def show(found: dict[str, dict[str, float]], console: Console) -> None:
    """A row per model."""
    table = Table("model", "English ability", "multilingual ability", "mean", title="Exact match of held-out answers")
    for name, values in found.items():
        table.add_row(name, *(f"{values[key]:.3f}" for key in ("EA", "MA", "mean")))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure both abilities of models.")
    parser.add_argument("--world", type=Path, required=True, help="folder that tasks.py wrote")
    parser.add_argument("--english", default="similar", help="the English set: similar or dissimilar")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("models", nargs="+", metavar="NAME=HF_DIR")
    args = parser.parse_args()
    named = dict(model.split("=", 1) for model in args.models)
    found = {name: abilities(Path(path), args.world, args.english) for name, path in named.items()}
    write_text(args.output, json.dumps(found, indent=1) + "\n")
    show(found, Console())


if __name__ == "__main__":
    main()
