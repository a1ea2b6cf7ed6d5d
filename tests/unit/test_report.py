"""The report: one page that needs nothing else, from a run's directory; what it says is what the run logged."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from megatron_ssu import cli
from megatron_ssu.errors import UserError
from megatron_ssu.report import charts
from megatron_ssu.report.page import read_results
from megatron_ssu.report.run_record import read_run_record
from tests.unit.test_verify import Case

LOG = """\
2026-01-02 10:00:00,000 INFO tiny on 2 (tensor) x 1 (pipeline) x 1 (data), bf16: 50.00% frozen (ssu: Source-Shielded Updates)
2026-01-02 10:00:00,100 INFO linear layers: megatron-core 0.16.1; attention: megatron-core 0.16.1 (auto)
2026-01-02 10:02:00,000 WARNING loss spike at iteration 3 <b>&
2026-01-02 10:05:00,000 INFO resuming after iteration 4
2026-01-02 11:00:00,000 INFO iteration 6/6 | loss 1.0
"""


def make_run(folder: Path, name: str = "amharic", source: float = 2.0, target: float = 4.0) -> Path:
    """A run's directory as `train` leaves it, with its export."""
    case = Case(folder / f"{name}-models")
    case.verify()
    run = folder / name
    (run / "logs").mkdir(parents=True)
    (run / "logs" / "rank_00000.log").write_text(LOG)
    shutil.copy(case.shield_path, run / "shield.safetensors")
    config = {
        "model": {"path": str(case.source)},
        "method": {"name": "ssu"},
        "data": {"sequence_length": 32},
        "train": {"iterations": 6, "global_batch_size": 4, "optimizer": {"lr": 5e-5}},
        "precision": {"dtype": "bf16"},
        "checkpoint": {"directory": str(run), "export": str(case.folder / "adapted1")},
    }
    (run / "run.yaml").write_text(yaml.safe_dump(config))
    lines = [{"iteration": 0, "source_valid_loss": source, "target_valid_loss": target}]
    for i in range(1, 7):
        lines.append({"iteration": i, "loss": 3.0 - 0.1 * i, "tokens_per_second": 100.0 + i, "skipped": i == 2})
    lines.append({"iteration": 6, "source_valid_loss": source * 1.02, "target_valid_loss": target * 0.8})
    lines.append({"iteration": 6, "tokens_read/am.jsonl": 768, "evaluate/chat/exact_match": 0.5})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


class Page(HTMLParser):
    """Text of a page, and every address in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.addresses, self.open = "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action", "data") and v]

    def handle_data(self, data):
        self.text += data


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    return ended.value.code


def test_the_page_says_what_the_runs_did_and_needs_no_network(tmp_path):
    first, second = make_run(tmp_path), make_run(tmp_path, "yoruba", 2.1, 3.9)
    line = {"model": "ssu", "data": "chat", "metric": "exact_match", "value": 0.4}
    lost = {"percent": 20.0, "low": 10.0, "high": 30.0}
    lines = [line | {"model": "base", "value": 0.5, "forgetting": None}, line | {"forgetting": lost}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    out = tmp_path / "report.html"
    assert run("report", first, second, "--results", tmp_path / "r.jsonl", "--verify", "--output", out) == 0
    text = out.read_text()
    page = Page(text)
    assert all(a.startswith(("data:", "#")) for a in page.addresses), page.addresses
    assert not re.search(r"@import|url\((?!#)|<script|<link(?! rel=\"icon\" href=\"data:)", text)
    for words in ("2.0000", "2.0400", "+2.0 %", "-20.0 %", "am.jsonl: 768 tokens", "6 of 6", "1:00:00", "2 (tensor)"):
        assert words in page.text, words
    assert "1 resumed, 1 steps skipped" in page.text and "loss spike at iteration 3 <b>&" in page.text
    assert "OK: no frozen bit moved" in page.text and "+20.0 % (+10.0 to +30.0)" in page.text
    assert f"megatron-ssu verify --source {tmp_path}" in page.text and "global_batch_size: 4" in page.text
    assert text.count("<svg") == 6  # plane, source, target, training loss, what was asked, speed
    assert "currentColor" in text and "#010203" not in text and "prefers-color-scheme: dark" in text


def test_a_browser_finds_no_fault(tmp_path):
    browser = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if browser is None:
        pytest.skip("no Chromium")
    out = tmp_path / "report.html"
    assert run("report", make_run(tmp_path), "--output", out) == 0
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=400,4000",
         f"--user-data-dir={tmp_path / 'browser'}", f"--screenshot={tmp_path / 'page.png'}", out.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (tmp_path / "page.png").stat().st_size > 20000, done.stderr
    assert "CONSOLE" not in done.stderr


def test_one_run_without_losses_or_shield_has_a_page_too(tmp_path):
    first = make_run(tmp_path)
    (first / "shield.safetensors").unlink()
    (first / "metrics.jsonl").write_text('{"iteration": 1, "loss": 2.5}\n')
    shutil.rmtree(first / "logs")
    assert run("report", first, "--output", tmp_path / "r.html") == 0
    assert (tmp_path / "r.html").read_text().count("<svg") == 1
    assert charts.plane([read_run_record(first)], "source_valid_loss", "target_valid_loss") is None


def test_figures_are_the_same_for_the_same_run(tmp_path):
    record = read_run_record(make_run(tmp_path))
    pictures = [charts.curves([record], [("loss", "training loss")]) for _ in range(2)]
    assert pictures[0] == pictures[1]
    assert record.series("loss") == ([1, 2, 3, 4, 5, 6], pytest.approx([2.9, 2.8, 2.7, 2.6, 2.5, 2.4]))
    assert record.tokens == {"am.jsonl": 768} and record.duration.total_seconds() == 3600


def test_what_is_wrong_is_said_in_a_line(tmp_path, capfd):
    first = make_run(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text("{}\n")
    out = ("--output", tmp_path / "r.html")
    moved = make_run(tmp_path, "moved")
    shutil.rmtree(tmp_path / "moved-models" / "adapted1")
    for arguments, line in (
        ((tmp_path / "empty", *out), "has no run.yaml; name the directory of a run"),
        ((first, first, *out), "is named twice"),
        (
            (first, "--results", tmp_path / "bad.jsonl", *out),
            "bad.jsonl: not what `megatron-ssu evaluate --output` writes",
        ),
        ((moved, "--verify", *out), "has no export"),
        ((first, "--output", tmp_path / "no" / "r.html"), "cannot be written"),
    ):
        assert run("report", *arguments) == 2
        said = capfd.readouterr().err.strip().splitlines()
        assert len(said) == 1 and line in said[0], said
        assert not (tmp_path / "r.html").exists()
    (first / "metrics.jsonl").write_text("{broken\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: damaged"):
        read_run_record(first)
    with pytest.raises(UserError, match="not what"):
        read_results(tmp_path / "none.jsonl")
