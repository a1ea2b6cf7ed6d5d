"""The blend of the training data: shares at every point, ramps, epochs, and going on with other weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from megatron_ssu.config.schema import Ramp
from megatron_ssu.data.blend import Blend, Share, continued
from megatron_ssu.errors import UserError


class Counted:
    """A part whose samples say their number, and hold so many tokens in turn."""

    def __init__(self, sizes, documents=10):
        self.sizes, self.documents = np.array(sizes), documents
        self.samples_per_epoch, self.tokens_per_epoch = float(len(sizes)), int(self.sizes.sum())
        self.reserved = 0

    def __getitem__(self, number):
        assert number < self.reserved
        return {"number": torch.tensor(number)}

    def tokens(self, count):
        return np.resize(self.sizes, count) if count else np.zeros(0, np.int64)

    def total_tokens(self, count):
        return int(self.tokens(count).sum())

    def reserve(self, count):
        self.reserved = count


def shares(*weights):
    return [Share(f"k{i}", f"{i}.jsonl", w) for i, w in enumerate(weights)]


def drawn(blend, begin, end):
    """(part, number) of every sample, as they are read."""
    found = []
    for i in range(begin, end):
        part = int(blend._order[i - blend.era.start])
        found.append((part, int(blend[i]["number"])))
    return found


RANDOM = np.random.default_rng(3)


@pytest.mark.parametrize("case", range(12))
def test_every_part_has_its_share_all_the_way(case):
    """Against exact cumulative shares, in samples and in tokens."""
    count = int(RANDOM.integers(2, 5))
    parts = [Counted(RANDOM.integers(1, 100, size=RANDOM.integers(3, 40))) for _ in range(count)]
    weights, unit = RANDOM.uniform(0.05, 3, size=count), ("samples", "tokens")[case % 2]
    blend = Blend(parts, shares(*map(float, weights)), unit, 600)
    largest = max(part.sizes.max() for part in parts) if unit == "tokens" else 1
    have, numbers = np.zeros(count), np.zeros(count, dtype=int)
    for part, number in drawn(blend, 0, 600):
        assert number == numbers[part], "each part is read in its order"
        have[part] += parts[part].tokens(number + 1)[-1] if unit == "tokens" else 1
        numbers[part] += 1
        assert np.abs(have - have.sum() * weights / weights.sum()).max() <= largest * count / 2 + 1e-9
    assert blend.drawn(600).tolist() == numbers.tolist()


def test_a_ramp_falls_over_the_run():
    parts = [Counted([8]), Counted([8])]
    blend = Blend(parts, shares(Ramp(0.8, 0.95), Ramp(0.2, 0.05)), "samples", 4000)
    second = np.array([part for part, _ in drawn(blend, 0, 4000)])
    for begin in range(0, 4000, 500):
        middle = (begin + 250) / 4000
        assert second[begin : begin + 500].mean() == pytest.approx(0.2 - 0.15 * middle, abs=0.005)
    assert second.sum() == pytest.approx(0.125 * 4000, abs=1)


@pytest.mark.parametrize("unit", ["samples", "tokens", "epochs"])
def test_a_ramp_in_any_unit_gives_the_mean_share(unit):
    parts = [Counted(RANDOM.integers(50, 100, 300)), Counted(RANDOM.integers(5, 20, 300))]
    blend = Blend(parts, shares(1.0, Ramp(0.5, 0.1)), unit, 3000)
    read = blend.read(3000)
    have = np.array([found["samples" if unit == "samples" else "tokens"] for found in read], dtype=float)
    scale = np.array([part.tokens_per_epoch for part in parts]) if unit == "epochs" else np.ones(2)
    middle = (np.arange(20000) + 0.5) / 20000
    weights = np.stack([np.full(20000, scale[0]), scale[1] * (0.5 - 0.4 * middle)])
    expected = (weights / weights.sum(axis=0)).mean(axis=1)
    assert have / have.sum() == pytest.approx(expected, rel=0.01)


def test_weights_in_epochs_read_each_part_so_often():
    parts = [Counted(RANDOM.integers(5, 100, 50)), Counted(RANDOM.integers(5, 100, 90))]
    blend = Blend(parts, shares(2.0, 1.0), "epochs", 2 * 50 + 90)
    assert [round(found["epochs"], 2) for found in blend.read(190)] == [2.0, 1.0]
    assert sorted(n for p, n in drawn(blend, 0, 190) if p == 1) == list(range(90))


def test_more_samples_begin_alike_and_one_part_is_itself():
    parts = [Counted([3, 5]), Counted([7])]
    short, long = (Blend(parts, shares(1.0, 2.0), "tokens", n) for n in (100, 250))
    assert drawn(short, 0, 100) == drawn(long, 0, 100)
    reach = Blend(parts, shares(1.0, 2.0), "tokens", 100, reach=250)
    assert drawn(reach, 0, 250) == drawn(long, 0, 250)
    ramp, further = (Blend(parts, shares(1.0, Ramp(2.0, 1.0)), "samples", 100, reach=n) for n in (0, 180))
    assert drawn(ramp, 0, 100) == drawn(further, 0, 100)
    assert drawn(Blend(parts[:1], shares(4.0), "samples", 50), 0, 50) == [(0, i) for i in range(50)]


def test_it_goes_on_with_other_weights_and_loses_and_repeats_nothing():
    parts, first = [Counted([8]), Counted([8]), Counted([8])], shares(1.0, 1.0, 2.0)
    blend = Blend(parts, first, "samples", 200)
    state = json.loads(json.dumps(blend.state(80)))
    era, change = continued(state, first, "samples", 200, 80)
    assert change == "" and drawn(Blend(parts, first, "samples", 200, era=era), 80, 200) == drawn(blend, 80, 200)

    added = Share("new", "new.jsonl", 1.0)
    second = [Share("k2", "2.jsonl", 5.0), first[0], added]  # one gone, one new, other order and weights
    era, change = continued(state, second, "samples", 200, 80)
    assert "from sample 80 on 2.jsonl 5, 0.jsonl 1, new.jsonl 1" in change
    later = Blend([parts[2], parts[0], Counted([8])], second, "samples", 200, era=era)
    before, after = drawn(blend, 0, 80), drawn(later, 80, 200)
    for old, new in ((2, 0), (0, 1)):
        numbers = [n for p, n in before if p == old] + [n for p, n in after if p == new]
        assert numbers == list(range(len(numbers)))
    assert [n for p, n in after if p == 2] == list(range(sum(p == 2 for p, _ in after)))
    assert np.mean([p == 0 for p, _ in after]) == pytest.approx(5 / 7, abs=0.02)

    again = json.loads(json.dumps(later.state(120)))  # and back: what had been left out continues
    era, _ = continued(again, first, "samples", 200, 120)
    last = Blend(parts, first, "samples", 200, era=era)
    numbers = [n for p, n in before if p == 1] + [n for p, n in drawn(last, 120, 200) if p == 1]
    assert numbers == list(range(len(numbers)))
    assert continued(again, second, "samples", 200, 120)[0] == later.era


def test_a_ramp_goes_on_where_it_was():
    parts, falling = [Counted([8]), Counted([8])], shares(1.0, Ramp(1.0, 0.0))
    blend = Blend(parts, falling, "samples", 1000)
    state = blend.state(500)
    era, change = continued(state, falling, "samples", 2000, 500)
    assert change and era.start == 500
    later = Blend(parts, falling, "samples", 2000, era=era)
    share = np.mean([p for p, _ in drawn(later, 500, 600)])
    assert share == pytest.approx(0.73 / 1.73, abs=0.02), "at 500 to 600 of 2000"


def test_another_text_under_the_same_name_is_refused():
    state = Blend([Counted([8])], shares(1.0), "samples", 10).state(5)
    with pytest.raises(UserError, match=r"data\.train: 0\.jsonl has other documents"):
        continued(state, [Share("other", "0.jsonl", 1.0)], "samples", 10, 5)


@pytest.mark.parametrize("weights", [(1, 3, 5), (0.7, 0.2, 0.1), (0.05, 0.15, 0.8), (1 / 3, 1 / 3, 1 / 3)])
@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_a_longer_run_begins_alike_whatever_the_weights(weights, unit):
    """Many samples are due at the same time; rounding must not decide between them by the run's length."""
    parts = [Counted([8]), Counted([8, 4]), Counted([16])]
    short, long = (Blend(parts, shares(*map(float, weights)), unit, n) for n in (3000, 6001))
    assert drawn(short, 0, 3000) == drawn(long, 0, 3000)


def test_a_path_may_be_read_in_two_ways():
    """As it is when a source is listed once in documents and once as a stream."""
    parts, twice = [Counted([8]), Counted([8])], [Share("a", "x.jsonl", 1.0), Share("b", "x.jsonl", 2.0)]
    blend = Blend(parts, twice, "samples", 90)
    assert [found["name"] for found in blend.read(90)] == ["x.jsonl", "x.jsonl #2"]
    state = json.loads(json.dumps(blend.state(30)))
    era, change = continued(state, twice, "samples", 90, 30)
    assert change == "" and drawn(Blend(parts, twice, "samples", 90, era=era), 30, 90) == drawn(blend, 30, 90)
    assert "from sample 30" in continued(state, twice[1:], "samples", 90, 30)[1]
    with pytest.raises(UserError, match=r"x\.jsonl has other documents"):
        continued(state, [Share("c", "x.jsonl", 1.0)], "samples", 90, 30)


def test_a_small_part_of_a_long_run_takes_little_memory():
    class Asked(Counted):
        most = 0

        def tokens(self, count):
            self.most = max(self.most, count)
            return super().tokens(count)

    parts = [Asked([8]), Asked([8])]
    Blend(parts, shares(999.0, 1.0), "tokens", 100_000)
    assert parts[0].most >= 99_900 and parts[1].most < 10_000
