"""The report of a GPU machine: what it does without a GPU, with parts that fail or hang, and its tables."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report() -> Any:
    """benchmarks/gpu_report.py, which is no package's module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("gpu_report", ROOT / "benchmarks" / "gpu_report.py")
        assert spec is not None and spec.loader is not None
        module: ModuleType = importlib.util.module_from_spec(spec)
        sys.modules["gpu_report"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        sys.modules.pop("gpu_report", None)


def step_row(what: str, factor: float) -> dict[str, Any]:
    parts = {"forward": 1.0, "backward": factor, "optimizer": factor / 2}
    sizes = {"shield %": 0.4, "state": factor, "exchange": factor, "peak": factor, "MFU %": 41.5}
    return {"what": what, "step ms": 200 * factor, "step": factor, "spread": "0.790-0.812", **parts, **sizes}


MADE_UP: dict[str, Any] = {
    "machine": {
        "gpu": "NVIDIA H100 80GB HBM3",
        "gpu_memory_gib": 79.1,
        "cuda": "13.0",
        "date": "2027-01-02",
        "versions": {"torch": "2.13.0"},
    },
    "parts": {
        "build": {"status": "ok", "seconds": 41.0, "output": "", "results": None},
        "tests": {
            "status": "failed",
            "seconds": 90.0,
            "output": "",
            "results": {"passed": 300, "failed": ["test_a[fp8]"], "skipped": 2},
        },
        "kernels": {
            "status": "ok",
            "seconds": 20.0,
            "output": "",
            "results": [
                {
                    "operation": "gather",
                    "mask": "column",
                    "dtype": "bf16",
                    "shard_mib": 256,
                    "bytes": 2e9,
                    "copy_bytes": 3e9,
                    "kernel": {"median": 1e-3},
                    "copy": {"median": 1e-3},
                    "share": 0.667,
                    "torch_share": 0.25,
                }
            ],
        },
        "step bf16": {
            "status": "ok",
            "seconds": 60.0,
            "output": "",
            "results": [step_row("stock", 1.0), step_row("SSU 0.5", 0.801), step_row("row 0.5", 0.795)],
        },
        "step fp8": {"status": "cut off", "seconds": 65.0, "output": "", "results": None},
        "profile": {
            "status": "ok",
            "seconds": 30.0,
            "output": "",
            "results": [{"what": "void gemm<a|b>", "calls": 12, "ms": 3.25, "fraction %": 40.1}],
        },
    },
}


def test_without_a_gpu_one_line_says_so(report: Any, tmp_path: Path, capsys: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert report.main(["--output", str(tmp_path / "found")]) == 0
    assert capsys.readouterr().out == "gpu-report: no GPU here, nothing was measured\n"
    assert not (tmp_path / "found").exists()


@pytest.mark.parametrize("asked", [[], ["--update-docs"]])
def test_measured_tables_go_into_the_docs_where_asked(
    asked: list[str], report: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(report, "machine", lambda: {})
    monkeypatch.setattr(report, "run_parts", lambda *arguments, **options: MADE_UP)
    updated: list = []
    monkeypatch.setattr(report, "update_docs", lambda found, docs: updated.append((found, docs)))
    failed = any(part["status"] != "ok" for part in MADE_UP["parts"].values())
    assert report.main(["--output", str(tmp_path), *asked]) == int(failed)
    assert updated == ([(MADE_UP, ROOT / "docs")] if asked else [])


def test_the_parts_fit_into_ten_minutes_and_name_real_scripts(report: Any, tmp_path: Path) -> None:
    parts = report.plan(tmp_path, "90")
    assert sum(part.seconds for part in parts) <= report.BUDGET < 600
    assert len({part.name for part in parts}) == len(parts)
    scripts = {command[0] for part in parts for command in part.commands if not command[0].startswith("-")}
    assert len(scripts) == 3 and all((ROOT / script).is_file() for script in scripts)


@pytest.mark.process
def test_a_part_that_fails_or_hangs_does_not_stop_the_others(report: Any, tmp_path: Path) -> None:
    write = "import json; json.dump({{'results': [{{'what': 'x'}}]}}, open({!r}, 'w')); print('done')"
    parts = [
        report.Part("broken", [["-c", "print('hello'); raise SystemExit(3)"], ["-c", "print('never')"]], 900),
        report.Part("hangs", [["-c", "import time; time.sleep(3600)"]], 3),
        report.Part("good", [["-c", write.format(str(tmp_path / "good.json"))]], 900, "good.json"),
        report.Part("silent", [["-c", "pass"]], 900, "silent.json"),
        report.Part("engine", [["-c", "raise SystemExit(1)"]], 60, engine=True),
    ]
    found = report.run_parts(parts, tmp_path, budget=3600, engine=False, described={"gpu": "x", "gpu_memory_gib": 1})
    assert found == json.loads((tmp_path / "report.json").read_text())
    states = {name: part["status"] for name, part in found["parts"].items()}
    assert states == {"broken": "failed", "hangs": "cut off", "good": "ok", "silent": "failed", "engine": "left out"}
    assert found["parts"]["broken"]["output"] == "hello\n" and "silent.json" in found["parts"]["silent"]["output"]
    assert found["parts"]["hangs"]["seconds"] < 3600
    assert found["parts"]["good"]["results"] == [{"what": "x"}]
    assert "| hangs | cut off" in (tmp_path / "report.md").read_text()


def test_no_part_begins_after_the_budget(report: Any, tmp_path: Path) -> None:
    found = report.run_parts([report.Part("late", [["-c", "pass"]], 60)], tmp_path, budget=0, engine=True, described={})
    assert found["parts"]["late"]["status"] == "no time"


def test_results_of_pytest_are_counted(report: Any, tmp_path: Path) -> None:
    cases = "<testcase name='a'/><testcase name='b'><failure/></testcase><testcase name='c'><skipped/></testcase>"
    (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert report.read_result(tmp_path / "tests.xml") == {"passed": 1, "failed": ["b"], "skipped": 1}


def test_tables_hold_the_figures(report: Any) -> None:
    text = report.markdown(MADE_UP)
    assert "| GPU | NVIDIA H100 80GB HBM3, 79.1 GiB |" in text
    assert "| `tests/gpu` | 300 passed, 1 failed (test_a[fp8]), 2 skipped |" in text
    assert "| gather, column shield, bf16, 256 MiB | 2,000 GB/s | 3,000 GB/s | 67% | 25% |" in text
    assert "| bf16, fused kernels | 200.0 | 160.2 | 0.801 | 0.790-0.812 | 1.000 | 0.801 |" in text.replace(
        "160.20000000000002", "160.2"
    )
    assert "| 0.4 % | 0.80 | 0.80 | 0.80 | 0.795 | 41.5 %, 41.5 % |" in text
    assert "| FP8, fused kernels | not measured |" in text
    assert "| `void gemm<a b>` | 12 | 3.25 | 40.1 % |" in text
    for block in re.split(r"\n\n", text):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1, "a table's rows have as many cells"


def test_the_docs_have_a_place_for_every_table(report: Any, tmp_path: Path) -> None:
    for name in ("gpu.md", "performance.md"):
        (tmp_path / name).write_text((ROOT / "docs" / name).read_text())
    report.update_docs(MADE_UP, tmp_path)
    once = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert "| GPU | NVIDIA H100" in once["gpu.md"] and "| bf16, fused kernels | 200.0 |" in once["performance.md"]
    report.update_docs(MADE_UP, tmp_path)
    assert once == {path.name: path.read_text() for path in tmp_path.iterdir()}
    (tmp_path / "performance.md").write_text("nothing marked")
    with pytest.raises(ValueError, match="no place for the table 'steps'"):
        report.update_docs(MADE_UP, tmp_path)
