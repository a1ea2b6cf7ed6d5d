"""What a run trains on: the sources of data.train with everything that the section `data` says of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from megatron_ssu.config.schema import DataSource, Ramp, RunConfig


@dataclass(frozen=True)
class Reading:
    """How documents are made of a source's rows."""

    text_key: str = "text"
    columns: tuple[tuple[str, str], ...] = ()  # what is read -> the column that has it
    split: str = "train"
    subset: str | None = None
    loss_on: str = "all"
    wrap: str = "none"
    wrap_prompt: str = ""

    def choices(self) -> dict[str, Any]:
        """What is not as it is by default, as JSON; `text_key` is left out."""
        names = ("columns", "split", "subset", "loss_on", "wrap", "wrap_prompt")
        found = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(PLAIN, name)}
        return found | ({"columns": dict(self.columns)} if self.columns else {})


PLAIN = Reading()


def train_sources(run: RunConfig) -> list[DataSource]:
    """data.train and then replay.path as a list of sources, none of whose fields is null but `subset`."""
    return [*_listed(run, run.data.train), *replay_sources(run)]


def replay_sources(run: RunConfig) -> list[DataSource]:
    """The last of `train_sources`: those that are replayed."""
    return _listed(run, run.replay.path or []) if replays(run) else []


def replays(run: RunConfig) -> bool:
    """Whether a part of what is trained on is replay."""
    fraction = run.replay.fraction
    return max(fraction.start, fraction.end) > 0 if isinstance(fraction, Ramp) else fraction > 0


def _listed(run: RunConfig, given: str | list[str | DataSource]) -> list[DataSource]:
    listed = [given] if isinstance(given, str) else given
    return [completed(run, s if isinstance(s, DataSource) else DataSource(s)) for s in listed]


def completed(run: RunConfig, source: DataSource) -> DataSource:
    """The source with the values of the section `data` where it gives none."""
    names = ("loss_on", "packing", "too_long", "wrap")
    return replace(source, **{n: getattr(run.data, n) for n in names if getattr(source, n) is None})


def reading(run: RunConfig, source: DataSource) -> Reading:
    """How the documents of a source are made."""
    source = completed(run, source)
    return Reading(
        text_key=run.data.text_key,
        columns=tuple(sorted(source.columns.items())),
        split=source.split,
        subset=source.subset,
        loss_on=source.loss_on or "all",
        wrap=source.wrap or "none",
        wrap_prompt=run.data.wrap_prompt if source.wrap == "answer" else "",
    )


def valid_sources(given: str | dict[str, str] | None) -> dict[str, str]:
    """data.source_valid or data.target_valid as name -> path; the name of a single path is ''."""
    if not given:
        return {}
    return {"": given} if isinstance(given, str) else dict(given)


def isolates(run: RunConfig) -> bool:
    """Whether documents in a row do not attend to each other."""
    given = run.data.cross_document_attention
    if given is not None:
        return not given
    return run.data.packing != "stream" or any(source.packing != "stream" for source in train_sources(run))


def counts_tokens(run: RunConfig) -> bool:
    """Whether samples hold different numbers of tokens with loss, so that a step's loss is a mean over all of them."""
    sources = train_sources(run)
    return any(source.packing != "stream" or source.loss_on != "all" for source in sources)


def weight_at(weight: float | Ramp, fraction: float) -> float:
    """A weight when `fraction` of the run is done."""
    return weight.start + (weight.end - weight.start) * fraction if isinstance(weight, Ramp) else weight


def is_weight(weight: float | Ramp) -> bool:
    """Whether it is finite, nowhere below 0 and not 0 all the time."""
    ends = (weight.start, weight.end) if isinstance(weight, Ramp) else (weight, weight)
    return all(math.isfinite(end) and end >= 0 for end in ends) and max(ends) > 0
