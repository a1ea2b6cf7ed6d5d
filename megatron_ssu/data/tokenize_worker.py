"""Lines to token ids: the work of `prepare`'s processes. Free of megatron, which would slow their start."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import parent_process
from pathlib import Path

from megatron_ssu.config.sources import Reading
from megatron_ssu.data.chat import encode_answer, encode_training_chat, is_chat, renamed
from megatron_ssu.data.jsonl import BadLine, parse_object, text_of
from megatron_ssu.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ssu.errors import one_line

Batch = list[tuple[int, bytes]]  # line number, line


@dataclass(frozen=True)
class EncodeJob:
    """What every batch of one `prepare` shares."""

    model_path: str
    trust_remote_code: bool
    reading: Reading
    begin: tuple[int, ...]  # ids put before every document of plain text
    end: int | None  # id put after every document
    turn_end: int | None  # id that may end a chat instead
    skip_bad_lines: bool


@dataclass
class Encoded:
    """One batch, tokenized, in the order of its lines."""

    documents: list[list[int]] = field(default_factory=list)
    masks: list[bytes | None] = field(
        default_factory=list
    )  # of each document: bytes, 1 where there is loss; None: everywhere
    skipped: int = 0  # bad lines
    empty: int = 0  # documents without a token
    first_bad: tuple[int, str] | None = None  # line number and complaint of the first bad line


def encode_batch(job: EncodeJob, batch: Batch) -> Encoded:
    """Tokenize a batch of lines. Without `skip_bad_lines` the first bad line ends it (`first_bad`).

    A line with `text_key` is plain text, in which nothing is a special token. A line with a chat instead (`messages`,
    `conversations`, `instruction`, `prompt`) is rendered with the chat template, special tokens and all.
    """
    result, reading = Encoded(), job.reading
    tokenizer = _tokenizer(job.model_path, job.trust_remote_code)
    answers = reading.loss_on == "answers"
    chats: list[tuple[list[int], bytes | None] | None] = []  # of every good line: its chat, or None for text
    texts: list[str] = []
    numbers: list[int] = []
    for number, line in batch:
        try:
            value = renamed(parse_object(line), reading.columns, reading.text_key)
            if reading.text_key not in value and is_chat(value):
                chats.append(encode_training_chat(value, tokenizer, answers=answers))
                continue
            text = text_of(value, reading.text_key)
            if reading.wrap == "answer":
                wrapped = encode_answer(text, reading.wrap_prompt, tokenizer)
                chats.append((wrapped[0], wrapped[1] if answers else None))
            else:
                texts.append(text)
                numbers.append(number)
                chats.append(None)
        except BadLine as error:
            result.skipped += 1
            result.first_bad = result.first_bad or (number, str(error))
            if not job.skip_bad_lines:
                return result
    plain = iter(_encode(tokenizer, texts, numbers))
    for chat in chats:
        ids, mask = (next(plain), None) if chat is None else chat
        if not ids:
            result.empty += 1
            continue
        if chat is None:
            ids = [*job.begin, *ids]  # templates begin and end a chat themselves
        if job.end is not None and (chat is None or ids[-1] not in (job.end, job.turn_end)):
            ids = [*ids, job.end]
            mask = None if mask is None else mask + b"\1"
        result.documents.append(ids)
        result.masks.append(mask)
    return result


def encode_file(job: EncodeJob, path: Path) -> None:
    """`encode_batch` from and to a pickle file, which holds the Encoded afterwards.

    What goes through the pipes that all processes share stays below PIPE_BUF so: a process that is killed while it
    writes a longer message leaves half of it there, for which the reader waits forever.
    """
    batch: Batch = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(encode_batch(job, batch)))


def _encode(tokenizer: Tokenizer, texts: list[str], numbers: list[int]) -> list[list[int]]:
    try:
        return tokenizer.encode_batch(texts)
    except Exception as error:
        for number, text in zip(numbers, texts):
            try:
                tokenizer.encode(text)
            except Exception as single:
                raise RuntimeError(f"the tokenizer fails on line {number}: {one_line(single)}") from single
        raise error


@lru_cache(maxsize=1)
def _tokenizer(model_path: str, trust_remote_code: bool) -> Tokenizer:
    return load_tokenizer(model_path, trust_remote_code=trust_remote_code)


def start_process() -> None:
    """First thing in a tokenizer process: leave signals to the parent, and end when it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
