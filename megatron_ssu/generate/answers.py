"""Answers of a model to prompts, as a file of chats: made batch by batch, by any number of processes, resumed after any stop.

OUTPUT.parts/job.json          what is being made; another job does not go on in it
OUTPUT.parts/batch-000007      the answers of one batch, written whole
OUTPUT, OUTPUT.json            the chats that pass the filters, and what they were made of and with
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers

from megatron_ssu import __version__
from megatron_ssu.config.coerce import show
from megatron_ssu.config.schema import GenerateSection
from megatron_ssu.config.sources import PLAIN
from megatron_ssu.data.rows import rows_digest
from megatron_ssu.data.tokenizer import load_tokenizer
from megatron_ssu.errors import UserError
from megatron_ssu.generate.backends import backend_name, open_backend
from megatron_ssu.generate.filters import Answer, refused_by
from megatron_ssu.generate.prompts import Prompt, read_prompts
from megatron_ssu.io.atomic import write_text
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.hub import local_directory
from megatron_ssu.models.source import open_source

Advance = Callable[[int], None]  # called with how many prompts of this process are answered


@dataclass(frozen=True)
class Job:
    """A file of answers that is to be made."""

    model: Path
    output: Path
    section: GenerateSection
    prompts: list[Prompt]
    dropped: int  # prompts that are too long
    facts: dict[str, Any]  # what the file follows from, as JSON
    trust_remote_code: bool = False

    @property
    def folder(self) -> Path:
        return self.output.with_name(f"{self.output.name}.parts")

    @property
    def batches(self) -> list[list[Prompt]]:
        size = self.section.batch_size
        return [self.prompts[i : i + size] for i in range(0, len(self.prompts), size)]

    def part(self, number: int) -> Path:
        return self.folder / f"batch-{number:06d}"


def open_job(
    model: str | Path,
    output: str | Path,
    section: GenerateSection,
    *,
    trust_remote_code: bool = False,
    key: str = "model.path",
) -> Job:
    """Read the prompts and check them against the model, which `key` named.

    Raises UserError as `read_prompts`, and for a model that is none.
    """
    source = open_source(model, key)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    prompts, dropped = read_prompts(section.prompts, tokenizer, section, source.dims.positions)
    facts = {
        "model": model_fingerprint(model),
        "prompts": rows_digest(section.prompts, PLAIN),
        "template": hashlib.sha256(json.dumps(tokenizer.chat_template).encode()).hexdigest(),
        **{key: value for key, value in asdict(section).items() if key not in ("prompts", "backend")},
        "backend": backend_name(section),
    }
    return Job(local_directory(model), Path(output), section, prompts, dropped, facts, trust_remote_code)


def is_made(job: Job) -> bool:
    """Whether the file is there and follows from the same. Raises UserError where it follows from something else."""
    if not job.output.exists():
        return False
    try:
        made = json.loads(_metadata(job.output).read_text(encoding="utf-8"))["facts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{job.output}: exists already; name another file, or remove it") from error
    _compare(job.output, made, job.facts, "exists already and was made with")
    return True


def begin(job: Job) -> None:
    """Make the folder of the parts, or find it as an earlier start of the same job left it. For one process.

    Raises UserError where another job's parts are there, or it cannot be made.
    """
    file = job.folder / "job.json"
    if file.exists():
        begun = json.loads(file.read_text(encoding="utf-8"))
        begun["filter"] = job.facts["filter"]  # applied when all is answered
        _compare(job.folder, begun, job.facts, "was begun with")
        return
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{job.folder}: cannot be made ({error.strerror})") from error
    write_text(file, json.dumps(job.facts, indent=1) + "\n")


def answer_share(job: Job, rank: int, ranks: int, advance: Advance = lambda count: None) -> None:
    """Answer the batches of one of `ranks` processes that are not answered yet. Raises UserError."""
    mine = list(enumerate(job.batches))[rank::ranks]
    done = sum(len(batch) for number, batch in mine if job.part(number).exists())
    advance(done)
    todo = [(number, batch) for number, batch in mine if not job.part(number).exists()]
    if not todo:
        return
    tokenizer = load_tokenizer(job.model, trust_remote_code=job.trust_remote_code)
    backend = open_backend(job.model, tokenizer, job.section, trust_remote_code=job.trust_remote_code)
    for number, batch in todo:
        answers = backend.answer(batch, number)
        write_text(job.part(number), json.dumps([asdict(answer) for answer in answers], ensure_ascii=False))
        done += len(batch)
        advance(done)


def publish(job: Job) -> dict[str, int]:
    """Join the parts into the file, less what filters refuse; how many answers were kept, and refused by which filter.

    For one process, when all have answered. Raises UserError where nothing is left.
    """
    lines, counts = [], Counter({"kept": 0, "too_long": job.dropped})
    for number, batch in enumerate(job.batches):
        found = [Answer(**answer) for answer in json.loads(job.part(number).read_text(encoding="utf-8"))]
        for prompt, answer in zip(batch, found, strict=True):
            refused = refused_by(answer, job.section.filter)
            counts[refused or "kept"] += 1
            if refused is None:
                messages = [*prompt.messages, {"role": "assistant", "content": answer.text}]
                tools = {} if prompt.tools is None else {"tools": prompt.tools}
                lines.append(json.dumps({"messages": messages, **tools}, ensure_ascii=False))
    if not lines:
        refused_most = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        raise UserError(
            f"{job.output}: no answer passes the filters ({refused_most}); loosen them, or look at {job.folder}"
        )
    metadata = {
        "facts": job.facts,
        "answers": dict(counts),
        "versions": {"megatron-ssu": __version__, "transformers": transformers.__version__},
    }
    write_text(_metadata(job.output), json.dumps(metadata, indent=1) + "\n")
    write_text(job.output, "\n".join(lines) + "\n")
    shutil.rmtree(job.folder, ignore_errors=True)
    return dict(counts)


def described(job: Job, counts: dict[str, int]) -> str:
    """What came out, in a line."""
    refused = ", ".join(f"{name} {count:,}" for name, count in counts.items() if name != "kept" and count)
    return f"{job.output}: {counts['kept']:,} of {sum(counts.values()):,} answers kept" + (
        f" (refused: {refused})" if refused else ""
    )


def _metadata(output: Path) -> Path:
    return output.with_name(f"{output.name}.json")


def _compare(place: Path, was: dict[str, Any], now: dict[str, Any], what: str) -> None:
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) != now.get(key):
            raise UserError(
                f"{place}: {what} another {key} ({_short(was.get(key))}, now {_short(now.get(key))}); change it back, name "
                "another file, or remove it"
            )


def _short(value: Any) -> str:
    return json.dumps(value)[:60] if isinstance(value, dict) else show(value)[:60]
