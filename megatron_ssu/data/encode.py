"""Lines to token ids: the work of `prepare`'s processes. Free of megatron, which would slow their start."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import parent_process

from megatron_ssu.data.jsonl import BadLine, parse_text
from megatron_ssu.data.tokenizer import Tokenizer, load_tokenizer, one_line

Batch = list[tuple[int, bytes]]  # line number, line


@dataclass(frozen=True)
class EncodeJob:
    """What every batch of one `prepare` shares."""

    model_path: str
    trust_remote_code: bool
    text_key: str
    end: int | None  # id put after every document
    skip_bad_lines: bool


@dataclass
class Encoded:
    """One batch, tokenized, in the order of its lines."""

    documents: list[list[int]] = field(default_factory=list)
    skipped: int = 0  # bad lines
    empty: int = 0  # documents without a token
    first_bad: tuple[int, str] | None = None  # line number and complaint of the first bad line


def encode_batch(job: EncodeJob, batch: Batch) -> Encoded:
    """Tokenize a batch of lines. Without `skip_bad_lines` the first bad line ends it (`first_bad`)."""
    result = Encoded()
    texts: list[str] = []
    numbers: list[int] = []
    for number, line in batch:
        try:
            texts.append(parse_text(line, job.text_key))
            numbers.append(number)
        except BadLine as error:
            result.skipped += 1
            result.first_bad = result.first_bad or (number, str(error))
            if not job.skip_bad_lines:
                return result
    for ids in _encode(_tokenizer(job.model_path, job.trust_remote_code), texts, numbers):
        if ids:
            result.documents.append([*ids, job.end] if job.end is not None else ids)
        else:
            result.empty += 1
    return result


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
