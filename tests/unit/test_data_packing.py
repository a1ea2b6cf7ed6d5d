"""Whole documents in rows: nothing lost or twice in an epoch, positions and masks, what is too long."""

from __future__ import annotations

import json
import logging
import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from megatron_ssu.config.schema import DataSource
from megatron_ssu.config.sources import Reading
from megatron_ssu.data.datasets import Parts, Settings, build_valid
from megatron_ssu.data.packing import best_fit
from megatron_ssu.data.prepare import prepare
from megatron_ssu.data.tokenizer import load_tokenizer
from megatron_ssu.errors import UserError
from megatron_ssu.train.micro_batches import unseen
from tests.unit.data_makers import TEXTS, make_hf_tokenizer

S = 48


@pytest.mark.parametrize("case", range(6))
def test_best_fit_loses_nothing_and_fills_as_the_plain_rule_does(case):
    draw = np.random.default_rng(case)
    places, length = draw.integers(1, 40, size=200), 40
    rows = best_fit(places, length)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert all(places[row].sum() <= length for row in map(np.array, rows))
    free = []  # the oracle: longest first, into the fullest row that holds it
    for i in np.argsort(-places, kind="stable"):
        fits = [f for f in free if f >= places[i]]
        if fits:
            free.remove(min(fits))
            free.append(min(fits) - places[i])
        else:
            free.append(length - places[i])
    assert sorted(length - places[row].sum() for row in map(np.array, rows)) == sorted(free)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Chats of 3 to about 120 tokens, each with its number in it, prepared with masks."""
    folder = tmp_path_factory.mktemp("packing")
    make_hf_tokenizer(folder / "model")
    draw = np.random.default_rng(0)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i}:"},
                {"role": "assistant", "content": f"{i}" * int(draw.integers(1, 12))},
            ]
        }
        for i in range(80)
    ]
    rows += [
        {"messages": [{"role": "user", "content": "x" * 60}, {"role": "assistant", "content": "y"}]}
    ]  # its answer is cut off
    rows += [{"messages": [{"role": "user", "content": "z"}, {"role": "assistant", "content": TEXTS[3] * 3}]}]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare([folder / "chats.jsonl"], folder / "chats", folder / "model", reading=Reading(loss_on="answers"), workers=1)
    return folder


def part(world, packing="documents", too_long="truncate", isolated=True, seed=5, split="1,0,0"):
    source = DataSource(str(world / "chats.jsonl"), packing=packing, too_long=too_long)
    parts = Parts(
        [(world / "chats", source)],
        load_tokenizer(world / "model"),
        Settings(S, split, seed, isolated),
        world / f"cache-{packing}",
        with_valid=False,
    )
    return parts.train[0]


def documents_of(sample):
    """(tokens, labels, mask) of every document in a row, padding last."""
    starts = np.flatnonzero(sample["position_ids"].numpy() == 0).tolist()
    return [
        tuple(sample[key][a:b].tolist() for key in ("tokens", "labels", "loss_mask"))
        for a, b in zip(starts, [*starts[1:], S], strict=True)
    ]


def originals(world):
    """(ids, mask) of every document by an own way."""
    tokenizer = load_tokenizer(world / "model")
    ids = np.fromfile(world / "chats.bin", np.uint16)
    mask = np.fromfile(world / "chats.loss", np.uint8)
    begins = np.flatnonzero(ids == tokenizer.encode_rendered("<|user|>")[0]) - 1
    return [(ids[a:b].tolist(), mask[a:b].tolist()) for a, b in zip(begins, [*begins[1:], len(ids)], strict=True)]


@pytest.mark.parametrize("packing", ["documents", "none"])
def test_an_epoch_holds_every_document_once(world, packing):
    found = part(world, packing)
    rows = int(found.samples_per_epoch)
    for epoch in range(2):
        seen = Counter(
            tuple(tokens[:1] + labels)
            for number in range(epoch * rows, (epoch + 1) * rows)
            for tokens, labels, mask in documents_of(found[number])
            if any(mask)
        )
        assert seen == Counter(tuple(ids[: S + 1]) for ids, mask in originals(world) if any(mask[1 : S + 1]))
    assert found.tokens(rows).sum() == found.tokens_per_epoch == found.total_tokens(rows)
    assert found.total_tokens(2 * rows + 3) == found.tokens(2 * rows + 3).sum()
    real = [int(sum(len(t) for t, _, m in documents_of(found[n]) if any(m))) for n in range(rows)]
    assert real == found.tokens(rows).tolist()


def test_masks_and_labels_are_those_of_the_documents(world):
    found, known = part(world), {tuple(ids[: S + 1]): mask[: S + 1] for ids, mask in originals(world)}
    for number in range(int(found.samples_per_epoch)):
        for tokens, labels, mask in documents_of(found[number]):
            if any(mask):
                key = tuple(tokens[:1] + labels)
                assert tokens[1:] == labels[:-1] and known[key][1:] == mask


def test_the_order_follows_the_seed_alone(world):
    def rows(found, count=60):
        return torch.stack([found[n]["tokens"] for n in range(count)])

    one = part(world)
    assert torch.equal(rows(one), rows(part(world)))
    assert not torch.equal(rows(one), rows(part(world, seed=6)))
    assert torch.equal(rows(pickle.loads(pickle.dumps(one))), rows(one)), "loader processes read the same"
    last = one[55]["tokens"]
    assert torch.equal(part(world)[55]["tokens"], last), "epochs can be read in any order"


def test_documents_that_are_seen_across_keep_one_count_of_positions(world):
    assert part(world, isolated=False)[0]["position_ids"].tolist() == list(range(S))


@pytest.mark.parametrize(("too_long", "left"), [("truncate", 81), ("drop", 80)])
def test_what_is_too_long(world, caplog, too_long, left):
    with caplog.at_level(logging.WARNING):
        assert part(world, too_long=too_long).documents == left
    why = "too long to hold any of their answers" if too_long == "truncate" else "are too long and"
    assert f"{82 - left} of 82 documents" in caplog.text and why in caplog.text


def test_what_is_too_long_can_be_refused(world):
    with pytest.raises(
        UserError, match=r"chats\.jsonl: document 81 has \d+ tokens and a row holds 49; raise data\.sequence_length"
    ):
        part(world, too_long="refuse")


def test_nothing_that_fits_is_refused(world):
    source = DataSource("chats.jsonl", packing="documents", too_long="drop")
    with pytest.raises(UserError, match=r"chats\.jsonl: none of its 82 documents fits a row of 3 tokens"):
        Parts([(world / "chats", source)], load_tokenizer(world / "model"), Settings(2), world / "c", with_valid=False)


def test_an_empty_part_of_the_split_is_named(world):
    with pytest.raises(UserError, match=r"chats\.jsonl: a part of data\.split has none of its 82 documents; give"):
        part(world, split="0.0001,1,0")


def test_a_split_divides_documents(world):
    assert part(world, split="3,1,0").documents in (60, 61, 62)


@pytest.mark.parametrize("packing", ["documents", "none"])
def test_validation_rows_hold_whole_documents_in_order(world, packing):
    tokenizer = load_tokenizer(world / "model")
    settings = Settings(S, isolated=True)
    valid = build_valid(world / "chats", tokenizer, settings, DataSource("", packing=packing, too_long="refuse"))
    found = [d for n in range(len(valid)) for d in documents_of(valid[n]) if any(d[2])]
    assert len(found) == 81
    assert sum(sum(mask) for _, _, mask in found) == sum(sum(mask[1 : S + 1]) for _, mask in originals(world))


def test_windows_have_the_masks(world):
    tokenizer = load_tokenizer(world / "model")
    valid = build_valid(world / "chats", tokenizer, Settings(S))
    mask = torch.cat([valid[n]["loss_mask"] for n in range(len(valid))])
    stored = np.fromfile(world / "chats.loss", np.uint8)
    assert mask[: len(stored) - 1].tolist() == stored[1:].tolist()


def test_a_stream_has_masks_and_isolated_positions(world):
    found = part(world, "stream")
    found.reserve(60)
    ids, mask = np.fromfile(world / "chats.bin", np.uint16), np.fromfile(world / "chats.loss", np.uint8)
    by_text = {tuple(i): tuple(m) for i, m in originals(world)}
    assert len(ids) == len(mask)
    whole = 0
    for number in range(20):
        sample = found[number]
        positions = sample["position_ids"].numpy()
        starts = np.flatnonzero(positions == 0)
        assert (np.diff(positions)[np.isin(np.arange(1, S), starts, invert=True)] == 1).all()
        for a, b in pairwise(starts):  # documents that begin and end in the row
            if a > 0:
                key = tuple(sample["tokens"][a:b].tolist())
                assert key in by_text and tuple(sample["loss_mask"][a - 1 : b - 1].tolist()) == by_text[key]
                whole += 1
    assert whole > 20


def test_what_is_not_seen():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    mask = unseen(positions)[:, 0]
    document = [[0, 0, 0, 1, 1, 2], [0] * 6]
    for b in range(2):
        for i in range(6):
            for j in range(6):
                assert bool(mask[b, i, j]) == (j > i or document[b][i] != document[b][j])
