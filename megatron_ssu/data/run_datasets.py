"""From a run file's data section to indexed datasets: which exist and which `prepare` must still make."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megatron_ssu.config.schema import DataSource, RunConfig
from megatron_ssu.config.sources import completed, reading, train_sources, valid_sources
from megatron_ssu.data.indexed import check_prefix, idx_path, prepared_prefix, source_kind
from megatron_ssu.data.prepare import PrepareReport, prepare
from megatron_ssu.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ssu.errors import UserError


@dataclass(frozen=True)
class Prefixes:
    """The indexed datasets of a run."""

    train: list[tuple[Path, DataSource]]
    source_valid: dict[str, Path]  # by name; '' where the run file gives one path
    target_valid: dict[str, Path]


def run_tokenizer(run: RunConfig) -> Tokenizer:
    """The tokenizer of model.path with the run file's data.document_end. Raises UserError."""
    return load_tokenizer(
        run.model.path, trust_remote_code=run.model.trust_remote_code, document_end=run.data.document_end
    )


def prepare_run(
    run: RunConfig, tokenizer: Tokenizer, console: Console | None = None, *, skip_bad_lines: bool = False
) -> tuple[Prefixes, list[PrepareReport]]:
    """Tokenize every JSONL file of the run file that is not tokenized yet, into `data_directory`.

    `tokenizer` is `run_tokenizer(run)`.

    Raises:
        UserError: a bad line (file and line named), a damaged dataset, no room to write.
    """
    reports: list[PrepareReport] = []

    def prefix_of(source: DataSource) -> Path:
        path = source.path
        if source_kind(path) == "indexed":
            _check_masked(source, check_prefix(path, tokenizer=tokenizer).masked)
            return Path(path)
        prefix = _prepared(run, source, tokenizer)
        if not idx_path(prefix).exists():  # the last of its files to get its name
            try:
                prefix.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{prefix.parent}: cannot be made: {error.strerror}; see data.directory") from error
            reports.append(
                prepare(
                    [path],
                    prefix,
                    run.model.path,
                    trust_remote_code=run.model.trust_remote_code,
                    document_end=run.data.document_end,
                    workers=run.data.workers,
                    reading=reading(run, source),
                    skip_bad_lines=skip_bad_lines,
                    overwrite=True,
                    console=console,
                )
            )
        return prefix

    train = [(prefix_of(source), source) for source in train_sources(run)]
    valid = [
        {name: prefix_of(completed(run, DataSource(path))) for name, path in valid_sources(given).items()}
        for given in (run.data.source_valid, run.data.target_valid)
    ]
    return Prefixes(train, *valid), reports


def present_train(run: RunConfig, tokenizer: Tokenizer) -> list[Path | None]:
    """The indexed datasets of data.train in its order; None for a JSONL file that is not tokenized, or not any more."""
    found = []
    for source in train_sources(run):
        indexed = source_kind(source.path) == "indexed"
        prefix = Path(source.path) if indexed else _prepared(run, source, tokenizer)
        found.append(prefix if indexed or idx_path(prefix).exists() else None)
    return found


def data_directory(run: RunConfig) -> Path:
    """Where a run keeps its tokenized text."""
    return Path(run.data.directory or Path(run.checkpoint.directory) / "data")


def _prepared(run: RunConfig, source: DataSource, tokenizer: Tokenizer) -> Path:
    return prepared_prefix(
        data_directory(run),
        source.path,
        tokenizer.digest,
        reading(run, source),
        chat_template=tokenizer.chat_template,
        marks=tokenizer.marks,
    )


def _check_masked(source: DataSource, masked: bool) -> None:
    """Raises UserError where an indexed dataset has loss on other tokens than its source says."""
    if masked != (source.loss_on == "answers"):
        made, asked = ("answers", "all") if masked else ("all", "answers")
        raise UserError(
            f"{source.path}: loss_on must be {made}, as the dataset was prepared, got {asked}; set it, or prepare the text "
            f"again with --loss-on {asked}"
        )
