"""Checks of the section `data`."""

from __future__ import annotations

import sys
import unicodedata

from megatron_ssu.config.checks.files import ROWS, data_path
from megatron_ssu.config.checks.values import at_least, seed_in_range
from megatron_ssu.config.schema import DataSource, GenerateSection, Ramp, RunConfig
from megatron_ssu.config.sources import is_weight, isolates, replay_sources, replays, train_sources, weight_at
from megatron_ssu.config.units import parse_split
from megatron_ssu.errors import UserError
from megatron_ssu.io.extras import require


def validate_data(run: RunConfig) -> None:
    """Check the data section, and that its files are there."""
    data = run.data
    at_least("data.sequence_length", data.sequence_length, 1)
    at_least("data.workers", data.workers, 1)
    at_least("data.loader_workers", data.loader_workers, 0)
    parse_split(data.used_split)
    if not data.text_key:
        raise UserError(
            "data.text_key: is empty; name the key of the JSONL lines that holds the text, for example text"
        )
    if not data.train:
        raise UserError("data.train: missing; name a JSONL file or the prefix of an indexed dataset, or a list of them")
    validate_replay(run)
    own = len(train_sources(run)) - len(replay_sources(run))
    for number, source in enumerate(train_sources(run)):
        section, given, at = (
            ("data.train", data.train, number) if number < own else ("replay.path", run.replay.path, number - own)
        )
        key = section if isinstance(given, str) else f"{section}.{at}"
        data_path(key, source.path)
        if not is_weight(source.weight):
            raise UserError(f"{key}.weight: must be above 0, got {_shown(source.weight)}; leave the part out instead")
        _columns(key, source)
        if ROWS.fullmatch(source.path) and (source.split != "train" or source.subset is not None):
            raise UserError(
                f"{key}: split and subset must be left out for a file, got {source.path}; name another file"
            )
    for section, sources in (("data.train", train_sources(run)[:own]), ("replay.path", train_sources(run)[own:])):
        for end, fraction in (("beginning", 0.0), ("end", 1.0)):
            if sources and not any(weight_at(source.weight, fraction) for source in sources):
                raise UserError(f"{section}: a weight must be above 0 at the {end} of the run, got 0 of all of them")
    if isolates(run) and run.parallel.context > 1:
        raise UserError(
            "data.cross_document_attention: false does not go with parallel.context_parallel_size: "
            f"{run.parallel.context}; set one of them otherwise"
        )
    for name in ("source_valid", "target_valid"):
        given = getattr(data, name)
        if isinstance(given, dict):
            for key, path in given.items():
                data_path(f"data.{name}.{key}", path)
        elif given is not None:
            data_path(f"data.{name}", given)


def validate_replay(run: RunConfig) -> None:
    """Check the section `replay`, and that its files are there."""
    replay = run.replay
    ends = (replay.fraction.start, replay.fraction.end) if isinstance(replay.fraction, Ramp) else (replay.fraction,)
    if not all(0 <= end < 1 for end in ends):
        raise UserError(f"replay.fraction: must be at least 0 and less than 1, got {_shown(replay.fraction)}")
    if replay.path and replay.generate:
        raise UserError("replay.generate: does not go with replay.path; leave one of them out")
    if not replays(run):
        return
    if not replay.path and not replay.generate:
        raise UserError(
            f"replay.path: missing, and replay.fraction is {_shown(replay.fraction)}; name data, or replay.generate"
        )
    if replay.generate:
        validate_generate(replay.generate, "replay.generate")


def validate_generate(section: GenerateSection, key: str) -> None:
    """Check how answers are to be generated, and that prompts are there; `key` is what the section is called."""
    data_path(f"{key}.prompts", section.prompts)
    for name in ("max_new_tokens", "batch_size"):
        at_least(f"{key}.{name}", getattr(section, name), 1)
    if section.samples is not None:
        at_least(f"{key}.samples", section.samples, 1)
    at_least(f"{key}.top_k", section.top_k, 0)
    at_least(f"{key}.temperature", section.temperature, 0)
    seed_in_range(f"{key}.seed", section.seed)
    for name, value in (("top_p", section.top_p), ("filter.max_repetition", section.filter.max_repetition)):
        if not 0 < value <= 1:
            raise UserError(f"{key}.{name}: must be above 0 and at most 1, got {value}")
    at_least(f"{key}.filter.min_tokens", section.filter.min_tokens, 0)
    if section.filter.max_tokens is not None:
        at_least(f"{key}.filter.max_tokens", section.filter.max_tokens, max(1, section.filter.min_tokens))
    if section.backend == "vllm":
        require(f"{key}.backend: vllm", "vllm", "vllm")
    if section.filter.language is not None:
        _language(f"{key}.filter", section.filter.language, section.filter.identifier)


def _language(key: str, language: str, identifier: str) -> None:
    """Refuse a script, or a language for langid, that there is none of."""
    if identifier == "script":
        letters = filter(str.isalpha, map(chr, range(sys.maxunicode + 1)))
        known = {unicodedata.name(letter, "?").split()[0].lower() for letter in letters}
        advice = "a script of Unicode such as latin or ethiopic, or a code with identifier: langid"
    else:
        require(f"{key}.identifier: langid", "langid", "language")
        import langid

        known = {code for code, _ in langid.rank("")}
        advice = f"one of langid's {len(known)} codes, such as en"
    if language.lower() not in known:
        raise UserError(f"{key}.language: must be {advice}, got {language!r}")


FIELDS = (
    "text",
    "prompt",
    "completion",
    "messages",
    "conversations",
    "tools",
    "instruction",
    "input",
    "output",
    "system",
)


def _columns(key: str, source: DataSource) -> None:
    """Refuse a mapping to what nobody reads."""
    for name in source.columns:
        if name not in FIELDS:
            raise UserError(f"{key}.columns: must map one of {', '.join(FIELDS)}, got {name!r}")


def _shown(weight: float | Ramp) -> str:
    return f"{weight.start} to {weight.end}" if isinstance(weight, Ramp) else str(weight)
