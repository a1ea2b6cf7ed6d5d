"""Chats in JSONL lines: the forms they come in, and rendering with the model's own chat template."""

from __future__ import annotations

from typing import Any

from megatron_ssu.data.jsonl import BadLine, check_unicode
from megatron_ssu.data.tokenizer import Tokenizer
from megatron_ssu.errors import one_line

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}


def is_chat(value: dict[str, Any]) -> bool:
    """Whether a line's object holds a chat rather than text."""
    return any(key in value for key in ("messages", "conversations", "instruction"))


def encode_chat(value: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    """Token ids of a sample in one of the forms that `read_sample` knows, special tokens recognised. Raises BadLine."""
    content = read_sample(value)
    if isinstance(content, str):
        return tokenizer.encode_rendered(check_unicode(content))
    if not tokenizer.has_chat_template:
        raise BadLine(f"a chat, but the tokenizer in {tokenizer.path} has no chat template; give `text` lines instead")
    try:
        text = tokenizer.render_chat(content)
    except Exception as error:  # templates raise jinja2's errors, and Python's for data they do not expect
        raise BadLine(f"the chat template cannot render it ({one_line(error)})") from error
    return tokenizer.encode_rendered(check_unicode(text))


def read_sample(value: dict[str, Any]) -> str | list[dict[str, Any]]:
    """A line's object as chat messages, or as a string to be taken as it stands. Raises BadLine.

    It holds `messages` (role, content), `conversations` (from, value), `instruction`/`input`/`output`, or `text`.
    """
    if "messages" in value:
        return _turns(value["messages"], "messages", "role", "content", roles=None)
    if "conversations" in value:
        return _turns(value["conversations"], "conversations", "from", "value", roles=_ROLES)
    if "instruction" in value:
        parts = {key: value.get(key) or "" for key in ("instruction", "input", "output")}
        for key, part in parts.items():
            if not isinstance(part, str):
                raise BadLine(f"{key!r} is not a string")
        if "output" not in value:
            raise BadLine("'instruction' without 'output'")
        user = parts["instruction"] + ("\n\n" + parts["input"] if parts["input"] else "")
        return [{"role": "user", "content": user}, {"role": "assistant", "content": parts["output"]}]
    if "text" in value:
        if not isinstance(value["text"], str):
            raise BadLine("'text' is not a string")
        return value["text"]
    keys = ", ".join(map(repr, list(value)[:8])) or "none"
    raise BadLine(f"none of 'messages', 'conversations', 'instruction', 'text' in it (keys: {keys})")


def _turns(value: Any, key: str, role_key: str, content_key: str, roles: dict[str, str] | None) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise BadLine(f"{key!r} is not a list of turns")
    turns = []
    for i, turn in enumerate(value):
        if not isinstance(turn, dict) or not isinstance(turn.get(role_key), str):
            raise BadLine(f"{key}[{i}] has no {role_key!r}")
        if roles is None:
            turns.append(turn)  # whole: templates read further keys, such as tool calls
            continue
        if turn[role_key] not in roles:
            raise BadLine(f"{key}[{i}]: {role_key!r} is {turn[role_key]!r}, not one of {', '.join(roles)}")
        if not isinstance(turn.get(content_key), str):
            raise BadLine(f"{key}[{i}] has no {content_key!r} that is a string")
        turns.append({"role": roles[turn[role_key]], "content": turn[content_key]})
    return turns
