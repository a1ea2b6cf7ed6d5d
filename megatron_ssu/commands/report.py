"""One page about runs, for someone who was not there."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from rich.console import Console

from megatron_ssu.errors import UserError
from megatron_ssu.io.atomic import check_writable, write_text
from megatron_ssu.io.extras import require
from megatron_ssu.report.run_record import RunRecord, read_run_record
from megatron_ssu.shield.verify import VerifyReport, verify


def run(run_file: None, options: argparse.Namespace, console: Console) -> int:
    require("report", "matplotlib", "plots")
    from megatron_ssu.report.page import read_results, render

    target = check_writable(options.output)
    runs = [read_run_record(path) for path in options.runs]
    _name_apart(runs)
    tables = [read_results(path) for path in options.results or []]
    verified = {}
    if options.verify:
        for record in runs:
            if record.shield is not None:
                verified[record.name] = _verified(record)
    given = [
        *options.runs,
        *(f"--results {path}" for path in options.results or []),
        *(["--verify"] if options.verify else []),
    ]
    command = shlex.join(["megatron-ssu", "report"]) + " " + " ".join(given) + f" --output {options.output}"
    write_text(target, render(runs, tables, verified, command))
    console.print(f"{target}: written", highlight=False, soft_wrap=True)
    return max((report.status for report in verified.values()), default=0)


def _verified(record: RunRecord) -> VerifyReport:
    export = record.get("checkpoint", "export")
    if not export or not Path(export).is_dir():
        raise UserError(
            f"--verify: {record.path}: has no export ({export or 'checkpoint.export is not set'}); export it, or leave "
            "--verify out"
        )
    assert record.shield is not None
    return verify(record.get("model", "path"), export, record.shield)


def _name_apart(runs: list[RunRecord]) -> None:
    """Runs of one name get the directory above before it. Raises UserError where one is named twice."""
    names = [run.name for run in runs]
    for run, name in zip(runs, names, strict=True):
        if names.count(name) > 1:
            run.name = f"{run.path.resolve().parent.name}/{name}"
    for run in runs:
        if sum(other.name == run.name for other in runs) > 1:
            raise UserError(f"report: {run.path} is named twice; name each run once")
