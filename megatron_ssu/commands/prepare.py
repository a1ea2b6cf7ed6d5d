"""Tokenize."""

from __future__ import annotations

import argparse

from rich.console import Console

from megatron_ssu.config.checks.checkpoint import validate_checkpoint
from megatron_ssu.config.checks.data import validate_data
from megatron_ssu.config.phases import checked_run
from megatron_ssu.config.schema import RunConfig
from megatron_ssu.config.sources import Reading
from megatron_ssu.data.prepare import PrepareReport
from megatron_ssu.data.prepare import prepare as prepare_files
from megatron_ssu.data.run_datasets import prepare_run, run_tokenizer
from megatron_ssu.errors import UserError
from megatron_ssu.train.run_lock import held


def run(run_file: RunConfig | None, options: argparse.Namespace, console: Console) -> int:
    """For a run file, or for single files into one dataset."""
    if run_file is not None:
        for name in ("workers", "text_key", "loss_on", "document_end", "overwrite", "trust_remote_code"):
            if getattr(options, name) not in (None, False):
                raise UserError(
                    f"prepare: --{name.replace('_', '-')} goes with --model and --output; a run file has data.workers, "
                    "data.text_key, data.loss_on, data.document_end and model.trust_remote_code, and changed files are "
                    "prepared anew"
                )
        prepare_of_run(run_file, console, skip_bad_lines=options.skip_bad_lines)
        return 0
    if options.overrides:
        raise UserError(f"prepare: {options.overrides[0]} goes with a run file, not with --model and --output")
    report = prepare_files(
        options.inputs,
        options.output,
        options.model,
        trust_remote_code=options.trust_remote_code,
        document_end=options.document_end,
        workers=2 if options.workers is None else options.workers,
        reading=Reading(text_key=options.text_key or "text", loss_on=options.loss_on or "all"),
        skip_bad_lines=options.skip_bad_lines,
        overwrite=options.overwrite,
        console=console,
    )
    console.print(
        f"{report.prefix}: {report.documents:,} documents, {report.tokens:,} tokens, {report.skipped} bad lines skipped",
        highlight=False,
    )
    return 0


def prepare_of_run(run: RunConfig, console: Console, *, skip_bad_lines: bool) -> None:
    """Tokenize what the run file, or each of its phases, names and is not tokenized yet."""
    runs = [checked_run(run, number) for number in range(len(run.phases))] or [run]
    for own in runs:
        validate_data(own)
        validate_checkpoint(own)
    reports: list[PrepareReport] = []
    with held(run.checkpoint.directory, "prepare"):
        for own in runs:
            reports += prepare_run(own, run_tokenizer(own), console, skip_bad_lines=skip_bad_lines)[1]
    for report in reports:
        console.print(
            f"{report.prefix}: {report.documents:,} documents, {report.tokens:,} tokens"
            + (f", {report.skipped} bad lines skipped" if report.skipped else ""),
            highlight=False,
            soft_wrap=True,
        )
    if not reports:
        console.print("nothing to do: all datasets are prepared", highlight=False)
