"""The prompts that a model answers: read out of rows, drawn by seed, rendered with the model's chat template."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ssu.config.schema import GenerateSection
from megatron_ssu.config.sources import PLAIN
from megatron_ssu.data.chat import is_chat, read_sample, tools_of
from megatron_ssu.data.jsonl import BadLine, check_unicode, parse_object
from megatron_ssu.data.rows import open_rows
from megatron_ssu.data.tokenizer import Tokenizer
from megatron_ssu.errors import UserError, one_line


@dataclass(frozen=True)
class Prompt:
    """One prompt: its row, the turns before the answer, and the same as token ids."""

    row: int  # in the file, from 1
    messages: list[dict[str, Any]]
    ids: list[int]
    tools: list[Any] | None = None  # that the template offers to the model


def read_prompts(
    path: str | Path, tokenizer: Tokenizer, section: GenerateSection, positions: int
) -> tuple[list[Prompt], int]:
    """The prompts that are to be answered, in the order of the file, and how many were dropped as too long.

    Raises UserError: a row that is no prompt, one that the template cannot render, one that is too long and is not to be
    dropped (file and row named); no prompts at all.
    """
    if not tokenizer.has_chat_template:
        raise UserError(
            f"{tokenizer.path}: the tokenizer has no chat template, so nothing can be asked; take an instruct model"
        )
    rows = list(open_rows(path, PLAIN))
    if not rows:
        raise UserError(f"{path}: no prompts in it")
    count = len(rows) if section.samples is None else min(section.samples, len(rows))
    chosen = sorted(random.Random(section.seed).sample(range(len(rows)), count))
    found, dropped = [], 0
    for number, line in (rows[i] for i in chosen):
        try:
            value = parse_object(line)
            messages, tools = turns_before_answer(value), tools_of(value)
            ids = tokenizer.encode_rendered(rendered(tokenizer, messages, tools))
        except BadLine as error:
            raise UserError(f"{path}:{number}: {error}") from error.__cause__
        if len(ids) + section.max_new_tokens <= positions:
            found.append(Prompt(number, messages, ids, tools))
        elif section.too_long == "drop":
            dropped += 1
        else:
            raise UserError(
                f"{path}:{number}: the prompt has {len(ids)} tokens, which with {section.max_new_tokens} new ones are more "
                f"than the model's {positions} positions; lower max_new_tokens, or drop such prompts (too_long: drop)"
            )
    if not found:
        raise UserError(f"{path}: all {len(chosen)} prompts are too long for the model's {positions} positions")
    return found, dropped


def turns_before_answer(value: dict[str, Any]) -> list[dict[str, Any]]:
    """A row's chat without the answer that it may end with; text is what a user says. Raises BadLine."""
    if is_chat(value):
        if "messages" not in value and "conversations" not in value:  # a question alone will do
            value = {"output": "", "completion": "", **value}
        turns = read_sample(value)
    else:
        turns = read_sample(value)
    if isinstance(turns, str):
        return [{"role": "user", "content": check_unicode(turns)}]
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not turns or turns[-1]["role"] != "user":
        raise BadLine("no turn of the user to answer")
    return turns


def rendered(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], tools: list[Any] | None) -> str:
    try:
        return check_unicode(tokenizer.render_chat(messages, add_generation_prompt=True, tools=tools))
    except BadLine:
        raise
    except Exception as error:  # templates raise jinja2's errors, and Python's for data they do not expect
        raise BadLine(f"the chat template cannot render it ({one_line(error)})") from error
