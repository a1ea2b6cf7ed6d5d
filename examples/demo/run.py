"""The whole demo: a world, a source model, two adaptations, a proof, a table and a plot.

Every step is a command that you could type yourself in the output folder; it is shown before it runs.

  python examples/demo/run.py [--output demo_out]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from steps import PYTHON, RANKED, TRAINER, Example, Step, output_argument, run

HERE = Path(__file__).resolve().parent


def script(name: str, *arguments: str) -> list[str]:
    """The command of a script beside this one."""
    return [PYTHON, str(HERE / name), *arguments]


VERIFY = ("--source", "hf/source", "--adapted", "hf/ssu", "--shield", "runs/ssu/shield.safetensors")
MODELS = ("before=hf/source", "FFT=hf/fft", "SSU=hf/ssu")
REPORT = ("--run", "FFT=runs/fft", "--run", "SSU=runs/ssu", "--plot", "forgetting.png")
DEMO = Example(
    name="demo",
    mark=".megatron-ssu-demo",
    run_files=[HERE / name for name in ("source.yaml", "fft.yaml", "ssu.yaml")],
    made=("world", "hf", "runs", "results.json", "forgetting.png", "report.html"),
    steps=[
        Step("Make the bilingual world", script("world.py", "--output", "world")),
        Step(
            "Make a tokenizer and an untrained model",
            script("make_model.py", "--world", "world", "--output", "hf/start"),
        ),
        Step("Train the source model (data-parallel)", [*RANKED, "train", "source.yaml"]),
        Step("Adapt it by full fine-tuning (tensor-parallel)", [*RANKED, "train", "fft.yaml"]),
        Step("Adapt it with Source-Shielded Updates (tensor-parallel)", [*RANKED, "train", "ssu.yaml"]),
        Step("Verify that no shielded bit moved", [*TRAINER, "verify", *VERIFY]),
        Step(
            "Evaluate with plain transformers",
            script("evaluate.py", "--world", "world", "--output", "results.json", *MODELS),
        ),
        Step("Compare", script("report.py", "--results", "results.json", *REPORT)),
        Step("Write one page about both runs", [*TRAINER, "report", "runs/fft", "runs/ssu", "--output", "report.html"]),
    ],
    result="forgetting.png",
)


if __name__ == "__main__":
    run(output_argument("Run the demo: about five minutes on two cores.", "demo_out"), DEMO)
