"""Two phases from nothing: English tasks, then the same in another language, and what both abilities are after each.

Every step is a command that you could type yourself in the output folder; it is shown before it runs. One that was stopped
goes on when it is typed again.

  python examples/two_phases/run.py [--output two_phases_out]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from steps import PYTHON, RANKED, Example, Step, output_argument, run

HERE = Path(__file__).resolve().parent
PHASES = "runs/two/phases"
MODELS = ("before=hf/base", f"english={PHASES}/1-english/model", f"language={PHASES}/2-language/model")
TWO_PHASES = Example(
    name="two-phase example",
    mark=".megatron-ssu-two-phases",
    run_files=[HERE / "base.yaml", HERE.parent / "two-phases.yaml"],
    made=("world", "hf", "runs", "abilities.json"),
    steps=[
        Step("Make texts and instructions", [PYTHON, str(HERE / "tasks.py"), "--output", "world"]),
        Step(
            "Make a tokenizer and an untrained model",
            [PYTHON, str(HERE.parent / "demo" / "make_model.py"), "--world", "world", "--output", "hf/untrained"],
        ),
        Step("Train the base model on texts", [*RANKED, "train", "base.yaml"]),
        Step("Two phases: English tasks, then another language", [*RANKED, "train", "two-phases.yaml"]),
        Step(
            "Both abilities after each phase, with plain transformers",
            [PYTHON, str(HERE / "abilities.py"), "--world", "world", "--output", "abilities.json", *MODELS],
        ),
    ],
    result="abilities.json",
)


if __name__ == "__main__":
    run(output_argument("Run the example: about five minutes on two cores.", "two_phases_out"), TWO_PHASES)
