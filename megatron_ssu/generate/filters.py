"""Which answers are kept. A filter is one entry: its name, and what it asks of an answer."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_ssu.config.schema import FilterSection

_GRAM = 4  # tokens
_SCRIPT_SHARE = 0.8  # of an answer's letters


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt."""

    text: str
    ids: list[int]  # without the token that ends the turn
    ended: bool  # by that token, within the limit


def repetition(ids: Sequence[int]) -> float:
    """Fraction of the 4-grams of `ids` that repeat an earlier one; 0 for fewer than two of them."""
    grams = [tuple(ids[i : i + _GRAM]) for i in range(len(ids) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def in_script(text: str, script: str) -> bool:
    """Whether at least 80 % of the letters are of a script, by their names in Unicode; without letters it is."""
    scripts = Counter(unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha())
    return scripts[script.upper()] >= _SCRIPT_SHARE * scripts.total()


def in_language(text: str, language: str) -> bool:
    """Whether langid takes the text for this language."""
    import langid

    return bool(langid.classify(text)[0] == language)


IDENTIFIERS: dict[str, Callable[[str, str], bool]] = {"script": in_script, "langid": in_language}

FILTERS: dict[str, Callable[[Answer, FilterSection], bool]] = {
    "empty": lambda answer, section: bool(answer.text.strip()),
    "ends": lambda answer, section: answer.ended or not section.ends,
    "min_tokens": lambda answer, section: len(answer.ids) >= section.min_tokens,
    "max_tokens": lambda answer, section: section.max_tokens is None or len(answer.ids) <= section.max_tokens,
    "max_repetition": lambda answer, section: repetition(answer.ids) <= section.max_repetition,
    "language": lambda answer, section: (
        section.language is None or IDENTIFIERS[section.identifier](answer.text, section.language)
    ),
}


def refused_by(answer: Answer, section: FilterSection) -> str | None:
    """The first filter that an answer does not pass; None where it passes all."""
    return next((name for name, passes in FILTERS.items() if not passes(answer, section)), None)
