"""Masks, shield files and scores files: bits, bytes, damage."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megatron_ssu.errors import UserError
from megatron_ssu.scoring.scores_file import Scores, random_bits, random_scores
from megatron_ssu.shield.mask import Mask, unit_count
from megatron_ssu.shield.plan import PlanOptions, plan_shield
from megatron_ssu.shield.shield_file import Shield, check_model, load_shield
from tests.unit.samples import matrices, scores_of, weights_of


@pytest.fixture
def scores() -> Scores:
    members = matrices()
    return scores_of(members, weights_of(members))


@pytest.fixture
def shield(scores: Scores) -> Shield:
    rows = {"model.embed_tokens.weight": ((36, 20), [1, 35])}
    return plan_shield(scores, PlanOptions(norms="frozen"), method="ssu", frozen_rows=rows)


def test_bit_layout_is_lowest_bit_first():
    frozen = np.zeros(10, dtype=bool)
    frozen[[0, 3, 9]] = True
    assert Mask.of("column", (4, 10), frozen).packed.tolist() == [0b00001001, 0b00000010]
    element = np.zeros((2, 5), dtype=bool)
    element[1, 0] = element[1, 4] = True  # flat 5 and 9
    assert Mask.of("element", (2, 5), element).packed.tolist() == [0b00100000, 0b00000010]


@pytest.mark.parametrize("granularity", ["column", "row", "element"])
@pytest.mark.parametrize("shape", [(5, 7), (8, 16), (3, 1), (64, 9)])
def test_mask_round_trip(granularity, shape):
    rng = np.random.default_rng(3)
    units = unit_count(granularity, shape)
    frozen = rng.random(units) < 0.4
    mask = Mask.of(granularity, shape, frozen)
    assert mask.packed.nbytes == (units + 7) // 8
    np.testing.assert_array_equal(mask.bits(), frozen)
    full = {"column": lambda: frozen[None, :], "row": lambda: frozen[:, None], "element": lambda: frozen.reshape(shape)}
    expected = np.broadcast_to(full[granularity](), shape)
    np.testing.assert_array_equal(mask.full(), expected)
    np.testing.assert_array_equal(mask.to_elements().elements(), expected)
    assert mask.frozen_units == frozen.sum()
    assert mask.frozen_elements == expected.sum()
    start, stop = units // 3, units - units // 4
    np.testing.assert_array_equal(mask.bits(start, stop), frozen[start:stop])


@pytest.mark.parametrize("units", [1, 7, 8, 9, 16])
def test_constant_masks_leave_spare_bits_zero(units):
    ones = Mask.constant("column", (2, units), True)
    assert ones.bits().all() and ones.frozen_units == units
    assert Mask.constant("column", (2, units), False).frozen_units == 0


def test_mask_refuses_wrong_bytes():
    with pytest.raises(ValueError, match="after the last unit"):
        Mask("column", (2, 5), np.array([0b100000], dtype=np.uint8))
    with pytest.raises(ValueError, match="bytes"):
        Mask("column", (2, 9), np.zeros(1, dtype=np.uint8))
    with pytest.raises(ValueError, match="two dimensions"):
        Mask.constant("column", (9,), True)
    with pytest.raises(ValueError, match="by row"):
        Mask.constant("column", (2, 9), True).rows()


def test_shield_file_round_trip(tmp_path, shield):
    shield.save(tmp_path / "s.safetensors")
    loaded = load_shield(tmp_path / "s.safetensors", check=True)
    assert loaded.header() == shield.header()
    assert loaded.digest() == shield.digest()
    for name, mask in shield.masks.items():
        assert loaded.masks[name].granularity == mask.granularity
        np.testing.assert_array_equal(loaded.masks[name].packed, mask.packed)
    assert loaded.masks["model.embed_tokens.weight"].rows().nonzero()[0].tolist() == [1, 35]
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "s.safetensors").read_bytes()


def test_others_may_read_it_as_the_umask_says(tmp_path, shield):
    before = os.umask(0o027)
    try:
        shield.save(tmp_path / "s")
    finally:
        os.umask(before)
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o640


def test_realised_counts_elements(shield):
    linear = shield.realised()["linear"]
    assert linear["frozen"] == sum(int(m.full().sum()) for n, m in shield.masks.items() if shield.matrices[n].scored)
    assert linear["ratio"] == 0.5
    everything = shield.realised()["all"]
    assert everything["frozen"] == linear["frozen"] + 2 * 20 + 3 * 20


_WRITE = """
import sys
from megatron_ssu.shield.plan import PlanOptions, ProtectRule, plan_shield
from tests.unit.samples import matrices, scores_of, weights_of
members = matrices()
weights = weights_of(members)
scores = scores_of(members, weights)
scores.save(sys.argv[1])
rules = [ProtectRule("layers:1", "frozen")]
for name, options in {
    "column": PlanOptions(budget="layerwise", floor=0.2, ceiling=0.9, protect=rules),
    "row": PlanOptions(granularity="row", score="random"),
    "element": PlanOptions(granularity="element", norms="half"),
}.items():
    plan_shield(scores, options, method="ssu", weights=weights.__getitem__).save(sys.argv[2] + name)
"""


@pytest.mark.process
def test_equal_content_is_equal_bytes_in_two_processes(tmp_path):
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        arguments = [str(tmp_path / run / "scores"), str(tmp_path / run / "shield-")]
        subprocess.run([sys.executable, "-c", _WRITE, *arguments], check=True)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["scores", "shield-column", "shield-element", "shield-row"]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_nothing_is_overwritten(tmp_path, shield):
    path = tmp_path / "s.safetensors"
    path.write_text("precious")
    with pytest.raises(UserError, match="already exists"):
        shield.save(path)
    assert path.read_text() == "precious" and [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
    shield.save(path, overwrite=True)
    load_shield(path, check=True)
    with pytest.raises(UserError, match="no such directory"):
        shield.save(tmp_path / "missing" / "s.safetensors")


@pytest.mark.parametrize("what", ["shield", "scores"])
def test_every_altered_byte_of_content_is_noticed(tmp_path, shield, scores, what):
    path = tmp_path / what
    (shield if what == "shield" else scores).save(path)
    good = path.read_bytes()
    header = int.from_bytes(good[:8], "little")
    # Spaces after the JSON are padding and hold nothing.
    end = 8 + len(good[8 : 8 + header].rstrip(b" "))
    rng = np.random.default_rng(0)
    positions = {0, 8, 9, end - 1, 8 + header, len(good) - 1} | {int(p) for p in rng.integers(8, end, 60)}
    positions |= {int(p) for p in rng.integers(8 + header, len(good), 30)}
    for position in sorted(positions):
        bad = bytearray(good)
        bad[position] ^= 0x01
        path.write_bytes(bytes(bad))
        with pytest.raises(UserError) as caught:
            load_shield(path, check=True) if what == "shield" else Scores.load(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value), position


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_files_are_refused(tmp_path, shield, scores, keep):
    for thing, load in ((shield, load_shield), (scores, Scores.load)):
        path = tmp_path / type(thing).__name__
        thing.save(path)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(UserError, match="truncated"):
            load(path)


def test_other_files_are_refused(tmp_path, shield, scores):
    with pytest.raises(UserError, match="no such shield"):
        load_shield(tmp_path / "none")
    save_file({"x": np.zeros(3)}, tmp_path / "plain")
    with pytest.raises(UserError, match="another kind"):
        load_shield(tmp_path / "plain")
    scores.save(tmp_path / "scores")
    with pytest.raises(UserError, match="not a shield file of this version"):
        load_shield(tmp_path / "scores")
    shield.save(tmp_path / "shield")
    with pytest.raises(UserError, match="not a scores file"):
        Scores.load(tmp_path / "shield")


def test_altered_mask_is_noticed_when_that_mask_is_read(tmp_path, shield):
    path = tmp_path / "s"
    shield.save(path)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    name = "model.layers.1.mlp.up_proj.weight"
    start = json.loads(raw[8 : 8 + length])[name]["data_offsets"][0]
    bad = bytearray(raw)
    bad[8 + length + start] ^= 0x10
    path.write_bytes(bytes(bad))
    loaded = load_shield(path)
    assert loaded.masks["model.layers.0.mlp.up_proj.weight"].frozen_units == 10
    with pytest.raises(UserError, match=rf"altered or damaged at {name}"):
        loaded.masks[name]


def test_header_has_one_key_and_no_paths(tmp_path, shield):
    path = tmp_path / "s"
    shield.save(path)
    raw = path.read_bytes()
    outer = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert list(outer) == ["megatron_ssu"]
    assert str(tmp_path) not in outer["megatron_ssu"]
    inner = json.loads(outer["megatron_ssu"])
    assert inner["matrices"]["model.layers.0.self_attn.q_proj.weight"] == {
        "frozen": 200,
        "granularity": "column",
        "kind": "q_proj",
        "layer": 0,
        "shape": [20, 20],
    }
    assert set(load_file(path)) == set(inner["matrices"])


def test_foreign_model_is_refused_with_both_names(shield):
    check_model(shield, shield.fingerprint, "tiny")
    with pytest.raises(UserError, match=r"model tiny .*other-7b"):
        check_model(shield, "00" * 32, "other-7b")


def test_a_foreign_shield_is_refused_by_its_file(tmp_path, shield):
    shield.save(tmp_path / "s")
    with pytest.raises(UserError, match=f"^{tmp_path / 's'}: made for model tiny and not for other-7b"):
        check_model(load_shield(tmp_path / "s"), "00" * 32, "other-7b")


def test_scores_round_trip(tmp_path, scores):
    scores.settings = {"seed": 7}
    scores.save(tmp_path / "s")
    loaded = Scores.load(tmp_path / "s")
    assert loaded.matrices == dict(sorted(scores.matrices.items()))
    assert (loaded.samples, loaded.tokens, loaded.settings) == (4, 64, {"seed": 7})
    for key, value in scores.tensors.items():
        assert loaded.tensors[key].dtype == np.float64
        np.testing.assert_array_equal(loaded.tensors[key], value)
    assert "wanda/row" in loaded.available()


def test_scores_name_what_is_wrong(tmp_path, scores):
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(UserError, match=r"no random by column .* it has fisher/column"):
        scores.column("random", name)
    scores.tensors[f"wanda/column/{name}"][4] = np.inf
    with pytest.raises(UserError, match=rf"wanda of {name} is NaN or infinite in 1 of 20 columns \(first: column 4\)"):
        scores.column("wanda", name)
    scores.tensors[f"wanda/column/{name}"] = np.zeros(3)
    with pytest.raises(UserError, match=rf"wanda by column of {name} has shape \(3,\), expected \(20,\)"):
        scores.save(tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_random_depends_on_seed_name_and_axis_alone():
    first = random_scores(1, "a", "column", 1000)
    np.testing.assert_array_equal(first[:7], random_scores(1, "a", "column", 7))
    assert random_bits(1234, "model.norm.weight", "element", 3).tolist() == [531309945, 3490037570, 2839477647]
    for other in (random_scores(2, "a", "column", 1000), random_scores(1, "b", "column", 1000)):
        assert not np.array_equal(first, other)
    assert first.min() >= 0 and first.max() < 1 and abs(first.mean() - 0.5) < 0.05
