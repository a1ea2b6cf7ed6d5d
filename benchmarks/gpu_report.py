"""Everything that one GPU can say about this project, within ten minutes: tests, kernels, steps, a profile.

python benchmarks/gpu_report.py --output gpu-report              measure; writes gpu-report/report.json and report.md
python benchmarks/gpu_report.py --docs gpu-report/report.json    put the tables of a report into docs/

Each part runs in a process of its own and for its time at most; one that fails or is cut off is written down, and the others
run. report.json is complete after every part. Exit status: 0, also without a GPU, where one line says so and nothing is
written; 1 where a part failed, found no time, or was left out because Transformer Engine, which it needs, is not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import begin, machine
from measure.report_tables import markdown, update_docs

from megatron_ssu.io.atomic import write_text

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 570.0  # seconds for all parts
GRACE = 5.0  # seconds that an interrupted part has to end
TAIL = 4000  # characters of a part's output that are kept
SHAPE: tuple[str, ...] = ("--hidden", "5120", "--ffn", "13824", "--heads", "40", "--layers", "2", "--dtype", "bf16")
SHAPE += ("--length", "4096", "--micro-batch", "1", "--batch", "2")
BUILT = "import sys; from megatron_ssu.ops import kernels as k; print(k.backend('cuda'), k.why_torch('cuda')); "
BUILT += "sys.exit(k.backend('cuda') != 'cuda')"


@dataclass(frozen=True)
class Part:
    """One part: commands after the interpreter, run in turn, and the seconds that they may take together."""

    name: str
    commands: Sequence[Sequence[str]]
    seconds: float
    result: str = ""  # the file in the output folder that it writes: .json of a benchmark or .xml of pytest
    environment: dict[str, str] = field(default_factory=dict)
    engine: bool = False  # needs Transformer Engine


def plan(output: Path, arch: str) -> list[Part]:
    """The parts, the important ones first; their times add up to the budget. `arch`: compute capability, such as 90."""

    def benchmark(name: str, script: str, seconds: float, *options: str, engine: bool = False) -> Part:
        file = f"{name}.json"
        command = [f"benchmarks/{script}.py", *options, "--json", str(output / file)]
        return Part(name, [command], seconds, file, engine=engine)

    def step(name: str, seconds: float, *options: str, engine: bool = False) -> Part:
        return benchmark(
            name, "step", seconds, *SHAPE, "--rounds", "6", "--variants", "SSU 0.5", *options, engine=engine
        )

    fp8 = ("--fp8", "hybrid")
    tests = ["-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={output / 'tests.xml'}"]
    tests += [
        "-n",
        str(min(10, os.cpu_count() or 1)),
        "--dist",
        "worksteal",
    ]  # one by one they take a quarter of an hour
    build = [["setup.py", "-q", "build_ext", "--inplace", "--force"], ["-c", BUILT]]
    return [
        Part("build", build, 70, environment={"MEGATRON_SSU_BUILD": "1", "MEGATRON_SSU_CUDA_ARCHS": arch}),
        Part("tests", [tests], 145, "tests.xml"),
        benchmark(
            "kernels",
            "kernels",
            40,
            "--device",
            "cuda",
            "--mib",
            "256",
            "--mask",
            "column",
            "fused",
            "--tokens",
            "8192",
            "--inputs",
            "4096",
        ),
        step("step bf16", 100, "row 0.5"),
        step("step fp8", 80, "row 0.5", *fp8, engine=True),
        benchmark("profile", "step", 45, *SHAPE, "--profile", "SSU 0.5"),
        step("step bf16 unfused", 45, "--unfused"),
        step("step fp8 unfused", 45, "--unfused", *fp8, engine=True),
    ]


def run_part(part: Part, output: Path, seconds: float) -> dict[str, Any]:
    """Run a part's commands for at most `seconds`; its status, time, output and results."""
    if part.result:
        (output / part.result).unlink(missing_ok=True)
    started, said, status = time.monotonic(), "", "ok"
    for arguments in part.commands:
        left = seconds - (time.monotonic() - started)
        code, text = _call([sys.executable, *arguments], part.environment, left)
        said += text
        if code != 0:
            status = "cut off" if code is None else "failed"
            break
    record: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - started, 1), "output": said[-TAIL:]}
    try:
        record["results"] = read_result(output / part.result) if part.result else None
    except (OSError, ValueError, KeyError, xml.ParseError) as error:
        record["results"] = None
        if status == "ok":
            record |= {"status": "failed", "output": f"{said[-TAIL:]}\n{part.result}: {error}"}
    return record


def _call(command: list[str], environment: dict[str, str], seconds: float) -> tuple[int | None, str]:
    """Exit status, None where it was cut off, and everything that was printed."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=max(seconds, 0.1))
        return process.returncode, text
    except subprocess.TimeoutExpired:
        return None, _end(process)


def _end(process: subprocess.Popen) -> str:
    """Interrupt a process and all that it started, so that pytest still writes what it has; kill what goes on. Its output."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)  # it leads a group of its own
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=GRACE)[0]
    return ""


def read_result(file: Path) -> Any:
    """Rows of a benchmark's JSON; of pytest's XML the number of tests by outcome and the names of those that failed."""
    if file.suffix == ".json":
        return json.loads(file.read_text(encoding="utf-8"))["results"]
    cases = list(xml.parse(file).getroot().iter("testcase"))
    failed = [
        case.attrib["name"] for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(failed) - skipped, "failed": failed, "skipped": skipped}


def run_parts(
    parts: Sequence[Part], output: Path, *, budget: float, engine: bool, described: dict[str, Any]
) -> dict[str, Any]:
    """Run all parts within `budget` seconds; report.json and report.md in `output` follow every one."""
    output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    report: dict[str, Any] = {"machine": described, "parts": {}}
    for part in parts:
        left = budget - (time.monotonic() - started)
        if part.engine and not engine:
            record: dict[str, Any] = {"status": "left out", "seconds": 0.0, "output": "needs Transformer Engine"}
        elif left < 1:
            record = {"status": "no time", "seconds": 0.0, "output": ""}
        else:
            record = run_part(part, output, min(part.seconds, left))
        report["parts"][part.name] = {"results": None, **record}
        report["seconds"] = round(time.monotonic() - started, 1)
        write_text(output / "report.json", json.dumps(report, indent=1) + "\n")
        write_text(output / "report.md", markdown(report))
        print(f"{part.name}: {record['status']}, {record['seconds']} s", flush=True)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or put a report into docs/; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("gpu-report"), help="folder of the report (default gpu-report)"
    )
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for all parts (default {BUDGET:.0f})")
    parser.add_argument("--update-docs", action="store_true", help="put the tables into docs/ when all parts have run")
    parser.add_argument("--docs", type=Path, metavar="REPORT", help="put the tables of this report.json into docs/")
    options = parser.parse_args(arguments)
    if options.docs:
        update_docs(json.loads(options.docs.read_text(encoding="utf-8")), ROOT / "docs")
        return 0
    begin()
    import torch

    if not torch.cuda.is_available():
        print("gpu-report: no GPU here, nothing was measured")
        return 0
    from megatron_ssu.models.build import has_transformer_engine

    output = options.output.resolve()
    parts = plan(output, "".join(map(str, torch.cuda.get_device_capability())))
    report = run_parts(parts, output, budget=options.budget, engine=has_transformer_engine(), described=machine())
    print(f"written: {options.output / 'report.json'} and report.md")
    if options.update_docs:
        update_docs(report, ROOT / "docs")
    if missing := [name for name, part in report["parts"].items() if part["status"] == "left out"]:
        print(f"left out: {', '.join(missing)}: Transformer Engine is not installed (docs/gpu.md)")
    return int(any(part["status"] != "ok" for part in report["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
