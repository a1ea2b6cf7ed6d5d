"""A small bilingual world: what happens in it is told in two languages, and one of them also chats.

Events (who does what, where, when) are drawn by seed and told either in the source language, a little English with
agreement and Latin letters, or in the target language, an invented one in Ethiopic letters: verb last, adjectives
behind their noun, case and number as suffixes. The chat tasks (repeat, reverse, uppercase, count, last, sort) exist in
the source language only: they are what an adaptation to the target language may forget.

  python world.py --output DIR [--seed N]
"""
# ruff: noqa: SIM905 - words read better as one line of words

from __future__ import annotations

import argparse
import json
import random
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_ssu.io.atomic import written_aside

BEINGS = (
    "king queen farmer baker miller sailor hunter teacher child singer painter shepherd "
    "bird horse wolf fox bear goat dog cat mouse fish owl duck"
).split()
THINGS = (
    "apple bread stone lamp book rope boat wheel crown drum knife basket letter ring coat bell "
    "candle ladder mirror blanket seed flower barrel hammer"
).split()
PLACES = "river forest garden market tower bridge field harbour village mountain kitchen road".split()
QUALITIES = "old young small big red white black happy quiet clever tired brave hungry kind strange gentle".split()
DEEDS = "see find carry follow love want bring hide watch help paint sell hear touch miss call".split()
MOTIONS = "walk sleep sing wait dance laugh run rest swim work sit hum".split()
TIMES = "today yesterday often never always early late again".split()
RELATIONS = "in near behind above".split()

TASKS = ("repeat", "reverse", "uppercase", "count", "last", "sort")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ETHIOPIC = [letter for letter in map(chr, range(0x1208, 0x1358)) if unicodedata.category(letter) == "Lo"]


@dataclass(frozen=True)
class Noun:
    """A noun phrase of an event."""

    stem: str
    plural: bool
    definite: bool
    quality: str | None = None


@dataclass(frozen=True)
class Event:
    """What happens: somebody does something, perhaps to somebody or something, somewhere, at some time."""

    actor: Noun
    deed: str
    patient: Noun | None
    relation: str | None
    place: Noun | None
    time: str | None


def draw_events(rng: random.Random) -> list[Event]:
    """One story: a few events among a small cast, so that earlier sentences tell about later ones."""
    cast = [_noun(rng, rng.choice(BEINGS), rng.random() < 0.6) for _ in range(2)]
    props = [_noun(rng, rng.choice(THINGS), rng.random() < 0.5) for _ in range(2)]
    place = Noun(rng.choice(PLACES), plural=False, definite=True)
    events = []
    for _ in range(rng.randint(4, 8)):
        actor, other = rng.sample(cast, 2)
        transitive = rng.random() < 0.65
        events.append(
            Event(
                actor=actor,
                deed=rng.choice(DEEDS if transitive else MOTIONS),
                patient=rng.choice([other, *props]) if transitive else None,
                relation=(relation := rng.choice(RELATIONS) if rng.random() < 0.45 else None),
                place=place if relation else None,
                time=rng.choice(TIMES) if rng.random() < 0.35 else None,
            )
        )
    return events


def _noun(rng: random.Random, stem: str, qualified: bool) -> Noun:
    return Noun(stem, rng.random() < 0.3, rng.random() < 0.7, rng.choice(QUALITIES) if qualified else None)


def source_sentence(event: Event) -> str:
    """The event in the source language: 'yesterday the old king sees some apples near the river.'"""
    verb = event.deed if event.actor.plural else _third_person(event.deed)
    words = [event.time or "", _source_noun(event.actor), verb]
    if event.patient:
        words.append(_source_noun(event.patient))
    if event.relation and event.place:
        words += [event.relation, _source_noun(event.place)]
    return " ".join(word for word in words if word) + "."


def _source_noun(noun: Noun) -> str:
    article = "the" if noun.definite else "some" if noun.plural else "one"
    stem = _plural(noun.stem) if noun.plural else noun.stem
    return " ".join(word for word in (article, noun.quality, stem) if word)


def _plural(stem: str) -> str:
    irregular = {"child": "children", "wolf": "wolves", "mouse": "mice", "fish": "fish", "knife": "knives"}
    return irregular.get(stem, stem + ("es" if stem.endswith(("x", "s")) else "s"))


def _third_person(verb: str) -> str:
    if verb.endswith("y"):
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("s", "sh", "ch")) else "s")


class TargetLanguage:
    """The invented language: every notion gets a stem of its own in Ethiopic letters, drawn by seed."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"target language {seed}")
        self._used: set[str] = set()
        notions = [*BEINGS, *THINGS, *PLACES, *QUALITIES, *DEEDS, *MOTIONS, *TIMES, *RELATIONS]
        self.stems = {notion: self._word(rng, rng.choice((2, 2, 3))) for notion in notions}
        self.suffixes = {mark: self._word(rng, 1) for mark in ("plural", "definite", "object", "by one", "by many")}

    def _word(self, rng: random.Random, length: int) -> str:
        while True:
            word = "".join(rng.choices(ETHIOPIC, k=length))
            if word not in self._used:
                self._used.add(word)
                return word

    def sentence(self, event: Event) -> str:
        """The event in the target language: time, actor, place, patient, verb; closed by the Ethiopic full stop."""
        words = [self.stems[event.time]] if event.time else []
        words += self._noun(event.actor)
        if event.relation and event.place:
            words += [*self._noun(event.place), self.stems[event.relation]]
        if event.patient:
            words += self._noun(event.patient, self.suffixes["object"])
        words.append(self.stems[event.deed] + self.suffixes["by many" if event.actor.plural else "by one"])
        return " ".join(words) + "።"

    def _noun(self, noun: Noun, case: str = "") -> list[str]:
        plural = self.suffixes["plural"] if noun.plural else ""
        definite = self.suffixes["definite"] if noun.definite else ""
        words = [self.stems[noun.stem] + plural + definite + case]
        return [*words, self.stems[noun.quality] + plural] if noun.quality else words


def draw_task(rng: random.Random, task: str) -> tuple[str, str]:
    """One exercise of `task`: the user's line and the answer."""
    if task in ("uppercase", "sort"):
        letters = rng.sample(LETTERS, 4)
        answer = sorted(letters) if task == "sort" else [letter.upper() for letter in letters]
        return f"{task.capitalize()}: {' '.join(letters)}", f"Answer: {' '.join(answer)}"
    # Fixed lengths: a model this small learns to copy within the demo's minutes only where the distance is the same.
    words = rng.sample(BEINGS + THINGS, rng.randint(1, 6) if task == "count" else 3)
    answers = {"repeat": words, "reverse": words[::-1], "count": [str(len(words))], "last": words[-1:]}
    return f"{task.capitalize()}: {' '.join(words)}", f"Answer: {' '.join(answers[task])}"


def draw_chats(rng: random.Random, count: int, taken: set[str]) -> Iterator[dict]:
    """`count` chats, the tasks in turn, none whose question is in `taken`."""
    made = 0
    while made < count:
        task = TASKS[made % len(TASKS)]
        question, answer = draw_task(rng, task)
        if question in taken:
            continue
        made += 1
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield {"task": task, "messages": messages}


def draw_texts(rng: random.Random, count: int, tell: Callable[[Event], str]) -> Iterator[dict]:
    """`count` stories, told by `tell`."""
    for _ in range(count):
        yield {"text": " ".join(tell(event) for event in draw_events(rng))}


@dataclass(frozen=True)
class WorldSize:
    """How much of everything is written."""

    source_train: int = 6000
    target_train: int = 6000
    valid: int = 200
    chat: int = 30000
    heldout_chat: int = 300


def write_world(output: Path, seed: int, size: WorldSize) -> dict[str, int]:
    """Write the world's six JSONL files into `output`; returns lines per file name. The same seed gives the same bytes.

    Held-out chats and validation stories are drawn first and occur in no training file.
    """
    output.mkdir(parents=True, exist_ok=True)
    target = TargetLanguage(seed)
    heldout = list(draw_chats(random.Random(f"held-out {seed}"), size.heldout_chat, set()))
    questions = {row["messages"][0]["content"] for row in heldout}
    files: dict[str, Iterable[dict]] = {
        "heldout_chat.jsonl": heldout,
        "chat.jsonl": draw_chats(random.Random(f"chat {seed}"), size.chat, questions),
    }
    for language, tell, count in (
        ("source", source_sentence, size.source_train),
        ("target", target.sentence, size.target_train),
    ):
        valid = list(draw_texts(random.Random(f"{language} valid {seed}"), size.valid, tell))
        seen = {row["text"] for row in valid}
        train = draw_texts(random.Random(f"{language} train {seed}"), count, tell)
        files[f"{language}_valid.jsonl"] = valid
        files[f"{language}_train.jsonl"] = (row for row in train if row["text"] not in seen)
    return {name: write_jsonl(output / name, rows) for name, rows in files.items()}


def write_jsonl(path: Path, rows: Iterable[dict]) -> int:
    """Write a line per row; returns how many."""
    count = 0
    with written_aside(path) as part, part.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo's bilingual world as JSONL files.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the six files")
    parser.add_argument("--seed", type=int, default=7, help="the same seed gives the same bytes (default 7)")
    args = parser.parse_args()
    for name, count in write_world(args.output, args.seed, WorldSize()).items():
        print(f"{args.output / name}: {count} lines")


if __name__ == "__main__":
    main()
