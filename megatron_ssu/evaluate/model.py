"""What is evaluated: something that says how likely tokens are, and answers greedily."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_ssu.data.tokenizer import Tokenizer

# Whether an answer, by its new token ids so far, is to end here.
Stop = Callable[[list[int]], bool]


@dataclass(frozen=True)
class Row:
    """Token ids, of which the last `scored` (at least 1, and fewer than all) are predicted from those before."""

    ids: list[int]
    scored: int


@dataclass(frozen=True)
class Score:
    """What a model makes of a row."""

    logprob: float  # sum over the scored tokens, nats
    greedy: bool  # whether each of them is the likeliest


class Model(Protocol):
    """A language model. Rows and prompts are answered in their order, however they are batched."""

    name: str
    path: str  # as it was named
    fingerprint: str  # of the weights that are evaluated
    positions: int
    tokenizer: Tokenizer
    ends: list[int]  # token ids that end an answer

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """Rows of at most `positions` + 1 tokens, of which the last is only predicted."""

    def answer(self, prompts: Sequence[list[int]], limit: int, stop: Stop | None = None) -> list[list[int]]:
        """The likeliest next tokens, one after the other: at most `limit`, up to and with the first of `ends`, or to `stop`."""

    def close(self) -> None:
        """Let go of the weights."""


def longest_first(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of rows in batches of `size`, the longest rows first, so that what is too large for memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + size] for i in range(0, len(order), size)]


def ended(answer: list[int], ends: Sequence[int]) -> bool:
    """Whether an answer ends its turn."""
    return bool(answer) and answer[-1] in ends
