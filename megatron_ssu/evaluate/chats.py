"""Answers to chats: exact match, whether they end, in which language they are, how much they repeat."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ssu.config.sources import PLAIN
from megatron_ssu.data.chat import is_chat, read_sample
from megatron_ssu.data.jsonl import BadLine, parse_object
from megatron_ssu.data.rows import open_rows, rows_digest
from megatron_ssu.errors import UserError
from megatron_ssu.evaluate.languages import Identify
from megatron_ssu.evaluate.measured import Measured, ratio
from megatron_ssu.evaluate.model import Model, ended
from megatron_ssu.generate.filters import repetition
from megatron_ssu.generate.prompts import rendered, turns_before_answer


@dataclass(frozen=True)
class Chat:
    """What is asked, and what is to be said; `task`: the group it is counted in."""

    row: int
    turns: list[dict[str, Any]]
    reference: str | None
    task: str | None


@dataclass(frozen=True)
class Chats:
    """Named chats."""

    name: str
    path: str
    chats: list[Chat]
    digest: str


@dataclass(frozen=True)
class Said:
    """A model's answer."""

    text: str
    ids: list[int]
    ended: bool


def read_chats(name: str, path: str | Path, limit: int | None = None) -> Chats:
    """The first `limit` chats of a JSONL file or a table; the last answer of each is the reference. `task` may group them.

    Raises UserError naming file and row.
    """
    chats: list[Chat] = []
    for number, line in open_rows(path, PLAIN):
        if limit is not None and len(chats) >= limit:
            break
        try:
            value = parse_object(line)
            task = value.get("task")
            chats.append(
                Chat(number, turns_before_answer(value), _reference(value), None if task is None else str(task))
            )
        except BadLine as error:
            raise UserError(f"{path}:{number}: {error}") from error
    if not chats:
        raise UserError(f"{path}: no chats in it")
    return Chats(name, str(path), chats, rows_digest(path, PLAIN))


def _reference(value: dict[str, Any]) -> str | None:
    if not is_chat(value):
        return None
    turns = read_sample(value)
    last = turns[-1] if not isinstance(turns, str) and turns else {"role": ""}
    return str(last["content"]) if last["role"] == "assistant" else None


def answer_chats(model: Model, chats: Chats, max_new_tokens: int) -> list[Said]:
    """Greedy answers of at most so many tokens. Raises UserError where a prompt cannot be rendered, or is too long."""
    if not model.tokenizer.has_chat_template:
        raise UserError(f"{model.path}: the tokenizer has no chat template, so nothing can be asked; leave --chats out")
    prompts = []
    for chat in chats.chats:
        try:
            ids = model.tokenizer.encode_rendered(rendered(model.tokenizer, chat.turns, None))
        except BadLine as error:
            raise UserError(f"{chats.path}:{chat.row}: {error}") from error
        if len(ids) + max_new_tokens > model.positions:
            raise UserError(
                f"{chats.path}:{chat.row}: the prompt has {len(ids)} tokens, which with {max_new_tokens} new ones are more "
                f"than the {model.positions} positions of {model.path}; lower --max-new-tokens or take the row out"
            )
        prompts.append(ids)
    found = []
    for ids in model.answer(prompts, max_new_tokens):
        done = ended(ids, model.ends)
        kept = ids[:-1] if done else ids
        found.append(Said(model.tokenizer.decode(kept), kept, done))
    return found


def measure_chats(chats: Chats, answers: Sequence[Said], identify: Identify, facts: dict[str, Any]) -> list[Measured]:
    """exact_match (by task too), ended (by language of the prompt too), in_language, language/LABEL, repetition.

    in_language: of the answers that are in the language of the reference, or without one in that of the prompt.
    """
    name, found = chats.name, []
    known = [i for i, chat in enumerate(chats.chats) if chat.reference is not None]
    if known:
        match = {i: float(answers[i].text == chats.chats[i].reference) for i in known}
        found.append(ratio(name, "exact_match", "higher", list(match.values())))
        tasks: defaultdict[str, list[float]] = defaultdict(list)
        for i, value in match.items():
            if (task := chats.chats[i].task) is not None:
                tasks[task].append(value)
        found += [ratio(name, f"exact_match/{task}", "higher", values) for task, values in sorted(tasks.items())]
    asked = [identify(str(chat.turns[-1]["content"])) for chat in chats.chats]
    wanted = [
        label if c.reference is None else identify(c.reference) for c, label in zip(chats.chats, asked, strict=True)
    ]
    spoken = [identify(answer.text) for answer in answers]
    ends = [float(answer.ended) for answer in answers]
    found.append(ratio(name, "ended", "higher", ends))
    if len(set(asked)) > 1:
        found += [
            ratio(name, f"ended/{label}", "higher", [e for e, own in zip(ends, asked, strict=True) if own == label])
            for label in sorted(set(asked))
        ]
    found.append(ratio(name, "in_language", "higher", [float(a == b) for a, b in zip(spoken, wanted, strict=True)]))
    for label, _ in sorted(Counter(spoken).items()):
        found.append(ratio(name, f"language/{label}", None, [float(own == label) for own in spoken]))
    found.append(ratio(name, "repetition", "lower", [repetition(answer.ids) for answer in answers]))
    for measured in found:
        measured.facts = {"file": chats.path, "digest": chats.digest, **facts}
    return found


def answers_as_jsonl(chats: Chats, answers: Sequence[Said]) -> str:
    """A line per chat: what was asked, wanted and said."""
    lines = []
    for chat, said in zip(chats.chats, answers, strict=True):
        line = {"messages": [*chat.turns, {"role": "assistant", "content": said.text}], "reference": chat.reference}
        lines.append(json.dumps(line | {"task": chat.task, "ended": said.ended}, ensure_ascii=False))
    return "\n".join(lines) + "\n"
