"""Instructions in the demo's bilingual world: two sets in English, and one of them again in the target language.

The events of examples/demo/world.py are told in one sentence each, and asked about: who, which deed, what comes first.
`similar` asks so in English, `language` in the target language, and each of its instructions has an English counterpart.
`dissimilar` is another kind of instruction: the demo's exercises with words and letters (repeat, reverse, count, sort, ...).

    similar.jsonl, dissimilar.jsonl, language.jsonl   training sets
    counterparts.jsonl                                the instructions of language.jsonl in English, line by line, with answers
    heldout_{similar,dissimilar,language}.jsonl       instructions that no training set has

  python tasks.py --output DIR [--seed N]
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
from world import (
    DEEDS,
    Event,
    Noun,
    TargetLanguage,
    WorldSize,
    draw_chats,
    draw_events,
    source_sentence,
    write_jsonl,
    write_world,
)

QUESTIONS = ("who", "deed", "first")


@dataclass(frozen=True)
class Size:
    """How many instructions each set has."""

    train: int = 6000
    heldout: int = 150


class Teller:
    """Asks about an event, in English or in the target language, and answers; the form of answers is the same in both."""

    def __init__(self, seed: int) -> None:
        self._target = TargetLanguage(seed)
        words = [self._target._word(random.Random(f"questions {seed}"), 2) for _ in QUESTIONS]
        self._asked = dict(zip(QUESTIONS, words, strict=True))

    def english(self, event: Event, question: str) -> tuple[str, str]:
        """The user's line and the answer."""
        sentence = source_sentence(event)
        return f"{question.capitalize()}: {sentence}", f"Answer: {_answer(question, sentence, _words(event.actor))}"

    def target(self, event: Event, question: str) -> tuple[str, str]:
        """The same in the target language, whose sentences end with the verb."""
        sentence = self._target.sentence(event)
        actor = " ".join(self._target._noun(event.actor))
        found = {"who": actor, "deed": sentence.split()[-1].rstrip("።"), "first": sentence.split()[0]}[question]
        return f"{self._asked[question]}፦ {sentence}", f"Answer: {found}"


def _words(noun: Noun) -> int:
    return 3 if noun.quality else 2


def _answer(question: str, sentence: str, actor: int) -> str:
    words = sentence.rstrip(".").split()
    return {"who": " ".join(words[:actor]), "deed": words[actor], "first": words[0]}[question]


def draw_event(rng: random.Random) -> Event:
    """One event among two: somebody does something to somebody or something."""
    while True:
        for event in draw_events(rng):
            if event.patient is not None and event.deed in DEEDS:
                return Event(event.actor, event.deed, event.patient, None, None, None)


def write_tasks(output: Path, seed: int, size: Size) -> dict[str, int]:
    """Write all files into `output`; returns lines per file. The same seed gives the same bytes.

    What is held out is drawn first, and occurs in no training set, in neither language.
    """
    output.mkdir(parents=True, exist_ok=True)
    teller = Teller(seed)
    held = list(_events(random.Random(f"held-out tasks {seed}"), size.heldout, set()))
    taken = {_key(event) for event, _ in held}
    similar = list(_events(random.Random(f"similar {seed}"), size.train, taken))
    language = list(_events(random.Random(f"language {seed}"), size.train, taken))
    letters = list(draw_chats(random.Random(f"held-out letters {seed}"), size.heldout, set()))
    asked = {row["messages"][0]["content"] for row in letters}
    files: dict[str, Iterable[dict]] = {
        "heldout_similar.jsonl": _rows(held, teller.english),
        "heldout_language.jsonl": _rows(held, teller.target),
        "heldout_dissimilar.jsonl": letters,
        "similar.jsonl": _rows(similar, teller.english),
        "dissimilar.jsonl": draw_chats(random.Random(f"letters {seed}"), size.train, asked),
        "language.jsonl": _rows(language, teller.target),
        "counterparts.jsonl": _rows(language, teller.english),
    }
    return {name: write_jsonl(output / name, rows) for name, rows in files.items()}


def _events(rng: random.Random, count: int, taken: set[str]) -> Iterator[tuple[Event, str]]:
    """Events with questions in turn, none of an event in `taken`."""
    made = 0
    while made < count:
        event = draw_event(rng)
        if _key(event) not in taken:
            yield event, QUESTIONS[made % len(QUESTIONS)]
            made += 1


def _key(event: Event) -> str:
    return source_sentence(event)


def _rows(events: Iterable[tuple[Event, str]], tell: Callable[[Event, str], tuple[str, str]]) -> Iterator[dict]:
    for event, question in events:
        asked, answer = tell(event, question)
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        yield {"task": question, "messages": messages}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write texts in both languages and the instruction sets as JSONL files."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the files")
    parser.add_argument("--seed", type=int, default=7, help="the same seed gives the same bytes (default 7)")
    args = parser.parse_args()
    counts = write_world(args.output, args.seed, WorldSize(chat=6000)) | write_tasks(args.output, args.seed, Size())
    for name, count in counts.items():
        print(f"{args.output / name}: {count} lines")


if __name__ == "__main__":
    main()
