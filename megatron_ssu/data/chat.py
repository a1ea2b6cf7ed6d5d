"""Chats in JSONL lines: the forms they come in, and rendering with the model's own chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from megatron_ssu.data.jsonl import BadLine, check_unicode
from megatron_ssu.data.tokenizer import Tokenizer
from megatron_ssu.errors import one_line

T = TypeVar("T")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
_FORMS = ("messages", "conversations", "instruction", "prompt")  # by each of which a chat is known


def is_chat(value: dict[str, Any]) -> bool:
    """Whether a line's object holds a chat rather than text."""
    return any(key in value for key in _FORMS)


def renamed(value: dict[str, Any], columns: Sequence[tuple[str, str]], text_key: str = "text") -> dict[str, Any]:
    """A row in which what is read goes by its own name, not its column's; where that is a chat or text, in no other form.

    Raises BadLine where a column is missing.
    """
    taken = {column for _, column in columns}
    if any(name in _FORMS or name == text_key for name, _ in columns):
        taken |= {*_FORMS, text_key}
    found = {key: member for key, member in value.items() if key not in taken}
    for name, column in columns:
        if column not in value:
            raise BadLine(f"no column {column!r} in it (columns: {', '.join(map(repr, list(value)[:8])) or 'none'})")
        found[name] = value[column]
    return found


def encode_chat(value: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    """Token ids of a sample in one of the forms that `read_sample` knows, special tokens recognised. Raises BadLine."""
    content = read_sample(value)
    if isinstance(content, str):
        return tokenizer.encode_rendered(check_unicode(content))
    return encode_training_chat(value, tokenizer, answers=False)[0]


def encode_training_chat(
    value: dict[str, Any], tokenizer: Tokenizer, *, answers: bool
) -> tuple[list[int], bytes | None]:
    """Token ids of a chat, and with `answers` a byte for each: 1 where the assistant says it, the end of its turn included.

    `tools` of the row go to the template. Raises BadLine.
    """
    messages = read_sample(value)
    if isinstance(messages, str):
        raise BadLine("not a chat")
    tools = tools_of(value)
    if not tokenizer.has_chat_template:
        raise BadLine(f"a chat, but the tokenizer in {tokenizer.path} has no chat template; give `text` lines instead")
    if not answers:
        return tokenizer.encode_rendered(_rendered(tokenizer, messages, tools)), None
    if not any(message["role"] == "assistant" for message in messages):
        raise BadLine("no turn of the assistant in it, and data.loss_on is answers")
    if tokenizer.marks_answers:
        ids, mask = _quoting_template(lambda: tokenizer.encode_marked(messages, tools))
        return ids, bytes(mask)
    text, spans = _answers(tokenizer, messages, tools)
    ids, offsets = tokenizer.encode_with_offsets(text)
    return ids, bytes(any(begin < high and end > low for low, high in spans) for begin, end in offsets)


def tools_of(value: dict[str, Any]) -> list[Any] | None:
    """The tools of a row, which the chat template describes. Raises BadLine."""
    tools = value.get("tools") or None
    if tools is not None and not isinstance(tools, list):
        raise BadLine("'tools' is not a list")
    return tools


def encode_answer(text: str, prompt: str, tokenizer: Tokenizer) -> tuple[list[int], bytes]:
    """Plain text as the assistant's answer to `prompt`, in the chat template; bytes as above. Raises BadLine.

    Nothing in the text becomes a special token. Of blanks alone there are none.
    """
    if not tokenizer.has_chat_template:
        raise BadLine(f"data.wrap: answer, but the tokenizer in {tokenizer.path} has no chat template; leave it out")
    text, user = check_unicode(text.strip()), {"role": "user", "content": prompt}
    if not text:
        return [], b""
    before = _rendered(tokenizer, [user], None, prompt=True)
    whole = _rendered(tokenizer, [user, {"role": "assistant", "content": text}], None)
    if not whole.startswith(before + text):
        raise BadLine("data.wrap: answer: the chat template does not write an answer as it stands; leave it out")
    first, last = tokenizer.encode_rendered(before), tokenizer.encode_rendered(whole[len(before + text) :].rstrip())
    answer = tokenizer.encode(text)
    return [*first, *answer, *last], bytes(len(first)) + b"\1" * (len(answer) + len(last))


def _answers(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: list[Any] | None
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered chat, and from where to where in it the assistant speaks; blanks after its turn are no part of it.

    A template that renders earlier turns otherwise when more follow cannot be marked so.
    """
    whole, spans = _rendered(tokenizer, messages, tools), []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _rendered(tokenizer, messages[:number], tools, prompt=True)
        after = _rendered(tokenizer, messages[: number + 1], tools).rstrip()
        if not (after.startswith(before) and whole.startswith(after)):
            raise BadLine(
                f"the chat template cannot mark answers: it renders the turns up to answer {number + 1} otherwise than within "
                "the chat; put {% generation %} into the template, or set data.loss_on: all"
            )
        spans.append((len(before), len(after)))
    return whole, spans


def _rendered(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: list[Any] | None, *, prompt: bool = False
) -> str:
    text = _quoting_template(lambda: tokenizer.render_chat(messages, add_generation_prompt=prompt, tools=tools))
    return check_unicode(text)


def _quoting_template(render: Callable[[], T]) -> T:
    try:
        return render()
    except BadLine:
        raise
    except Exception as error:  # templates raise jinja2's errors, and Python's for data they do not expect
        raise BadLine(f"the chat template cannot render it ({one_line(error)})") from error


def read_sample(value: dict[str, Any]) -> str | list[dict[str, Any]]:
    """A line's object as chat messages, or as a string to be taken as it stands. Raises BadLine.

    It holds `messages` (role, content), `conversations` (from, value), `instruction`/`input`/`output` or `prompt`/`completion`,
    the last two with a `system` prompt or without, or `text`.
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
        return _exchange(value, user, parts["output"])
    if "prompt" in value:
        for key in ("prompt", "completion"):
            if not isinstance(value.get(key), str):
                raise BadLine(f"{key!r} is not a string")
        return _exchange(value, value["prompt"], value["completion"])
    if "text" in value:
        if not isinstance(value["text"], str):
            raise BadLine("'text' is not a string")
        return value["text"]
    keys = ", ".join(map(repr, list(value)[:8])) or "none"
    raise BadLine(f"none of 'messages', 'conversations', 'instruction', 'prompt', 'text' in it (keys: {keys})")


def _exchange(value: dict[str, Any], user: str, assistant: str) -> list[dict[str, Any]]:
    system = value.get("system") or ""
    if not isinstance(system, str):
        raise BadLine("'system' is not a string")
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return [{"role": "system", "content": system}, *turns] if system else turns


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
