"""Checks of the section `evaluate`: its files, and the figures that its rules name."""

from __future__ import annotations

from pathlib import Path

from megatron_ssu.config.checks.files import data_path
from megatron_ssu.config.checks.values import at_least
from megatron_ssu.config.schema import RuleSection, RunConfig
from megatron_ssu.errors import UserError

_KINDS = ("source_valid", "target_valid")


def validate_evaluate(run: RunConfig) -> None:
    """Raises UserError naming the key for what is wrong with the section."""
    section = run.evaluate
    at_least("evaluate.interval", section.interval, 0)
    for name in ("max_new_tokens", "batch_size", "limit", "sequence_length"):
        if getattr(section, name) is not None:
            at_least(f"evaluate.{name}", getattr(section, name), 1)
    for kind in ("texts", "chats"):
        for name, path in getattr(section, kind).items():
            if Path(f"{path}.idx").exists():
                raise UserError(f"evaluate.{kind}.{name}: {path} is an indexed dataset; name a JSONL file or a table")
            data_path(f"evaluate.{kind}.{name}", path)
    if section.asks:
        for key, size in (
            ("context_parallel_size", run.parallel.context),
            ("virtual_pipeline_model_parallel_size", run.parallel.virtual_pipeline or 1),
        ):
            if size > 1:
                raise UserError(
                    f"evaluate: texts, chats and tasks are not asked with parallel.{key}: {size}; leave them out"
                )
    if section.best is not None:
        _check_figure(run, "evaluate.best.figure", section.best.figure)
        _check_rule(run, "evaluate.best.unless", section.best.unless)
    _check_rule(run, "evaluate.stop_when", section.stop_when)


def _check_rule(run: RunConfig, key: str, rule: RuleSection | None) -> None:
    if rule is not None:
        _check_figure(run, f"{key}.figure", rule.figure)
        at_least(f"{key}.worse_by", rule.worse_by, 0)


def _check_figure(run: RunConfig, key: str, figure: str) -> None:
    section, known = run.evaluate, []
    for kind in _KINDS:
        given = getattr(run.data, kind)
        names = [f"/{name}" for name in given] if isinstance(given, dict) else [""]
        if given or kind == "target_valid":
            known += [f"{kind}_loss{name}" for name in names]
    data = [*section.texts, *section.chats]
    if figure in known or any(figure.startswith(f"evaluate/{name}/") for name in data):
        return
    if section.tasks and figure.startswith("evaluate/"):
        return
    known += [f"evaluate/{name}/METRIC" for name in data]
    raise UserError(f"{key}: must be a figure of this run, {' or '.join(known)}, got {figure!r}")
