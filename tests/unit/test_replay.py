"""Replay as a part of a blend: its fraction at every point of the run, whatever the other weights."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ssu.config.schema import (
    CheckpointSection,
    DataSection,
    DataSource,
    ModelSection,
    Ramp,
    ReplaySection,
    RunConfig,
)
from megatron_ssu.config.sources import replay_sources, train_sources
from megatron_ssu.data.blend import Blend, Share
from tests.unit.test_blend import Counted, drawn


def shares(fraction, *weights, replayed=1):
    first = len(weights) - replayed
    return [Share(f"k{i}", f"{i}", w, fraction if i >= first else None) for i, w in enumerate(weights)]


@pytest.mark.parametrize("unit", ["samples", "tokens", "epochs"])
def test_the_fraction_holds_whatever_the_weights(unit):
    draw = np.random.default_rng(1)
    parts = [Counted(draw.integers(5, 99, 200)), Counted(draw.integers(5, 30, 80)), Counted(draw.integers(5, 99, 300))]
    blend = Blend(parts, shares(0.1, 5.0, Ramp(1.0, 3.0), 0.2), unit, 3000)
    read = blend.read(3000)
    what = "samples" if unit == "samples" else "tokens"
    assert read[2][what] / sum(found[what] for found in read) == pytest.approx(0.1, rel=0.01)


def test_a_falling_fraction_and_several_sources():
    parts = [Counted([8]) for _ in range(3)]
    blend = Blend(parts, shares(Ramp(0.2, 0.05), 1.0, 3.0, 1.0, replayed=2), "samples", 4000)
    part = np.array([part for part, _ in drawn(blend, 0, 4000)])
    for begin in range(0, 4000, 1000):
        here = part[begin : begin + 1000]
        assert (here > 0).mean() == pytest.approx(0.2 - 0.15 * (begin + 500) / 4000, abs=0.003)
    assert (part == 1).sum() / (part > 0).sum() == pytest.approx(0.75, abs=0.01)


def test_a_fraction_of_nothing_replays_nothing():
    run = RunConfig(ModelSection("m"), CheckpointSection("c"), data=DataSection(train="a.jsonl", packing="documents"))
    run.replay = ReplaySection(fraction=0.0, path=["b.jsonl"])
    assert replay_sources(run) == []
    run.replay = ReplaySection(fraction=0.2, path=["b.jsonl", DataSource("c.jsonl", 2.0, packing="stream")])
    assert [(s.path, s.packing) for s in train_sources(run)] == [
        ("a.jsonl", "documents"),
        ("b.jsonl", "documents"),
        ("c.jsonl", "stream"),
    ]
