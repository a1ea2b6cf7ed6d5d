"""Loss on texts, per byte and per token. Every document is read alone, after the token that begins documents."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_ssu.config.sources import PLAIN
from megatron_ssu.data.jsonl import BadLine, parse_object, text_of
from megatron_ssu.data.rows import open_rows, rows_digest
from megatron_ssu.data.tokenizer import Tokenizer
from megatron_ssu.errors import UserError
from megatron_ssu.evaluate.measured import Measured, ratio
from megatron_ssu.evaluate.model import Model, Row


@dataclass(frozen=True)
class Texts:
    """Named documents."""

    name: str
    path: str
    documents: list[str]
    digest: str


def read_texts(name: str, path: str | Path, limit: int | None = None) -> Texts:
    """The first `limit` documents of a JSONL file or a table. Raises UserError naming file and row."""
    documents: list[str] = []
    for number, line in open_rows(path, PLAIN):
        if limit is not None and len(documents) >= limit:
            break
        try:
            documents.append(text_of(parse_object(line)))
        except BadLine as error:
            raise UserError(f"{path}:{number}: {error}") from error
    documents = [text for text in documents if text]
    if not documents:
        raise UserError(f"{path}: no text in it")
    return Texts(name, str(path), documents, rows_digest(path, PLAIN))


def measure_texts(model: Model, texts: Texts, length: int | None = None) -> list[Measured]:
    """loss_per_byte and loss_per_token, nats; windows of `length` tokens (default, and at most: the model's positions).

    Raises UserError where a loss is not finite.
    """
    length = min(length or model.positions, model.positions)
    rows, owners, tokens = [], [], [0] * len(texts.documents)
    for number, ids in enumerate(model.tokenizer.encode_batch(texts.documents)):
        for row in windows(prefix_of(model.tokenizer), ids, length):
            rows.append(row)
            owners.append(number)
            tokens[number] += row.scored
    losses = [0.0] * len(texts.documents)
    for owner, score in zip(owners, model.score(rows), strict=True):
        losses[owner] -= score.logprob
    if not math.isfinite(sum(losses)):
        raise UserError(f"{model.path}: its loss on {texts.path} is not finite; look for a broken checkpoint")
    size = [float(len(text.encode())) for text in texts.documents]
    found = [
        ratio(texts.name, "loss_per_byte", "lower", losses, size),
        ratio(texts.name, "loss_per_token", "lower", losses, [float(n) for n in tokens]),
    ]
    for measured in found:
        measured.facts = {"file": texts.path, "digest": texts.digest, "sequence_length": length}
    return found


def prefix_of(tokenizer: Tokenizer) -> int:
    """The token that stands before a text: what documents begin with, else what they end with."""
    return tokenizer.document_begin[-1] if tokenizer.document_begin else tokenizer.document_end


def windows(prefix: int, ids: list[int], length: int) -> Iterator[Row]:
    """Rows that together predict every token of a document once, of at most `length` tokens that are read.

    The last one has the tokens before it as context, up to `length`; as lm-evaluation-harness' rolling windows.
    """
    whole = [prefix, *ids]
    for first in range(0, len(ids), length):
        count = min(length, len(ids) - first)
        end = first + count + 1
        yield Row(whole[max(0, end - length - 1) if first else 0 : end], count)
