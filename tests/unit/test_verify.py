"""Reading Hugging Face directories, fingerprints, and the comparison of frozen bits."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

import megatron_ssu.shield.verify as verify_module
from megatron_ssu.errors import UserError
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.hf_config import difference
from megatron_ssu.models.hf_files import HFCheckpoint
from megatron_ssu.shield.mask import Mask
from megatron_ssu.shield.plan import PlanOptions, plan_shield
from megatron_ssu.shield.verify import VerifyReport, verify
from tests.unit.samples import CONFIG, matrices, scores_of, weights_of, write_hf

Q0 = "model.layers.0.self_attn.q_proj.weight"
EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"
INT = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


class Case:
    """A source model, a shield of it and an adapted model whose every trainable element moved."""

    def __init__(self, folder: Path, granularity: str = "column", dtype: torch.dtype = torch.bfloat16, shards: int = 1):
        members = matrices()
        self.weights = {n: w.to(dtype) for n, w in weights_of(members).items()}
        self.source = write_hf(folder / "source", self.weights, shards)
        scores = scores_of(members, self.weights)
        scores.fingerprint = model_fingerprint(self.source)
        scores.model = "source"
        self.shield = plan_shield(
            scores,
            PlanOptions(granularity=granularity, norms="half"),
            method="ssu",
            weights=self.weights.__getitem__,
            frozen_rows={EMBED: ((36, 20), [1, 35])},
        )
        self.shield_path = folder / "shield.safetensors"
        self.shield.save(self.shield_path)
        self.adapted = {n: w.clone() for n, w in self.weights.items()}
        for name, w in self.adapted.items():
            mask = self.shield.masks.get(name)
            trainable = torch.ones_like(w, dtype=torch.bool) if mask is None else ~torch.from_numpy(mask.full().copy())
            bits = w.view(INT[dtype])
            bits[trainable] += 1
        self.folder = folder
        self.runs = 0

    def verify(self, shards: int = 1) -> VerifyReport:
        self.runs += 1
        directory = write_hf(self.folder / f"adapted{self.runs}", self.adapted, shards)
        return verify(self.source, directory, self.shield_path)

    def flip(self, name: str, index: tuple[int, ...], bit: int = 0) -> None:
        w = self.adapted[name]
        w.view(INT[w.dtype])[index] ^= 1 << bit


@pytest.mark.parametrize("chunk", [1 << 24, 64, 1])
@pytest.mark.parametrize("granularity", ["column", "row", "element"])
def test_counts_are_exact(tmp_path, monkeypatch, granularity, chunk):
    monkeypatch.setattr(verify_module, "_CHUNK", chunk)
    case = Case(tmp_path, granularity, dtype=torch.float32)
    report = case.verify(shards=3)
    assert report.ok
    assert {m.name for m in report.matrices} == set(case.weights)
    for m in report.matrices:
        mask = case.shield.masks.get(m.name)
        if mask is None:
            assert (m.granularity, m.frozen, m.trainable) == ("none", 0, case.weights[m.name].numel())
        else:
            assert (m.granularity, m.frozen, m.trainable) == (
                mask.granularity,
                mask.frozen_units,
                mask.units - mask.frozen_units,
            )
        assert m.moved_frozen == 0 and m.moved_trainable == m.trainable, m
    case.adapted = case.weights
    assert all(m.moved_trainable == 0 for m in case.verify().matrices)


@pytest.mark.parametrize("granularity", ["column", "row", "element"])
@pytest.mark.parametrize("chunk", [1 << 24, 37])
def test_one_flipped_frozen_bit_is_found(tmp_path, monkeypatch, granularity, chunk):
    monkeypatch.setattr(verify_module, "_CHUNK", chunk)
    case = Case(tmp_path, granularity)
    mask = case.shield.masks[Q0]
    row, column = (int(i) for i in np.argwhere(mask.full())[-1])
    case.flip(Q0, (row, column))
    report = case.verify()
    assert not report.ok
    (found,) = [m for m in report.matrices if m.moved_frozen]
    unit = {"column": column, "row": row, "element": row * 20 + column}[granularity]
    assert (found.name, found.moved_frozen, found.first_moved) == (Q0, 1, (unit,))
    assert found.moved_trainable == found.trainable


def test_frozen_rows_and_norm_elements_count(tmp_path):
    case = Case(tmp_path)
    case.flip(EMBED, (35, 0), bit=15)
    element = int(np.flatnonzero(case.shield.masks[NORM].elements())[0])
    case.flip(NORM, (element,))
    report = case.verify()
    assert {m.name: m.first_moved for m in report.matrices if m.moved_frozen} == {EMBED: (35,), NORM: (element,)}


def test_bits_are_compared_not_values(tmp_path):
    """-0.0 equals 0.0 and NaN equals nothing, but bits tell."""
    case = Case(tmp_path)
    column = int(np.flatnonzero(case.shield.masks[Q0].columns())[0])
    for weights in (case.weights, case.adapted):
        weights[Q0][0, column], weights[Q0][1, column] = 0.0, float("nan")
    for f in (tmp_path / "source").iterdir():
        f.unlink()
    (tmp_path / "source").rmdir()
    write_hf(tmp_path / "source", case.weights)
    case.shield.fingerprint = model_fingerprint(tmp_path / "source")
    case.shield.save(case.shield_path, overwrite=True)
    assert case.verify().ok
    case.adapted[Q0][0, column] = -0.0
    assert not case.verify().ok
    case.adapted[Q0][0, column] = 0.0
    case.flip(Q0, (1, column))  # another NaN
    assert case.adapted[Q0][1, column].isnan() and not case.verify().ok


def test_report_renders_and_is_json(tmp_path):
    case = Case(tmp_path)
    good = case.verify()
    console = Console(file=io.StringIO(), width=140)
    good.render(console)
    text = console.file.getvalue()
    assert Q0 in text and "OK: no frozen bit moved" in text and "100.00%" in text
    column = int(np.flatnonzero(case.shield.masks[Q0].columns())[0])
    case.flip(Q0, (0, column))
    bad = case.verify()
    console = Console(file=io.StringIO(), width=140)
    bad.render(console)
    assert f"{Q0}: 1 columns ({column})" in console.file.getvalue() and "FAILED" in console.file.getvalue()
    value = json.loads(json.dumps(bad.to_dict()))
    assert value["ok"] is False and value["totals"]["column"]["moved_frozen"] == 1
    assert value["totals"]["column"]["matrices"] == 14


def test_another_definition_fails_though_no_bit_moved(tmp_path):
    case = Case(tmp_path)
    adapted = write_hf(tmp_path / "adapted", case.adapted)
    config = {**CONFIG, "transformers_version": "9", "dtype": "float32", "use_cache": False, "rope_scaling": None}
    (adapted / "config.json").write_text(json.dumps(config | {"rope_theta": 10000}))
    assert verify(case.source, adapted, case.shield_path).status == 0
    (adapted / "config.json").write_text(json.dumps(config | {"rope_theta": 500000.0, "head_dim": 4}))
    report = verify(case.source, adapted, case.shield_path)
    assert (report.ok, report.moved, report.status) == (False, False, 1)
    assert report.definition == (("head_dim", None, 4), ("rope_theta", 10000, 500000))
    console = Console(file=io.StringIO(), width=140)
    report.render(console)
    text = console.file.getvalue()
    assert "config.json: rope_theta is 500000, was 10000" in text and "head_dim is 4, was not set" in text
    assert "FAILED: no frozen bit moved, but" in text and json.loads(json.dumps(report.to_dict()))["ok"] is False


def test_another_tokenizer_is_told_and_does_not_fail(tmp_path):
    case = Case(tmp_path)
    adapted = write_hf(tmp_path / "adapted", case.adapted)
    for folder, words, spacing in ((case.source, {"a": 1}, 1), (adapted, {"a": 1}, 3)):
        (folder / "vocab.json").write_text(json.dumps(words, indent=spacing))  # the same in other layout
        (folder / "merges.txt").write_text(str(spacing))
    (case.source / "chat_template.jinja").write_text("x")
    (adapted / "added_tokens.json").write_text("{}")
    (adapted / "megatron-ssu.json").write_text("{}")
    report = verify(case.source, adapted, case.shield_path)
    assert report.ok
    assert report.files == (
        ("added_tokens.json", "added"),
        ("chat_template.jinja", "missing"),
        ("merges.txt", "differs"),
    )
    console = Console(file=io.StringIO(), width=140)
    report.render(console)
    assert "merges.txt: differs" in console.file.getvalue() and "OK: no frozen" in console.file.getvalue()


def test_a_shield_that_freezes_nothing_proves_nothing(tmp_path):
    case = Case(tmp_path)
    masks = {n: Mask.constant(m.granularity, m.shape, False) for n, m in case.shield.masks.items()}
    replace(case.shield, masks=masks, counts={}).save(case.shield_path, overwrite=True)
    report = case.verify()
    assert (report.ok, report.status) == (False, 2)
    console = Console(file=io.StringIO(), width=140)
    report.render(console)
    assert "nothing is frozen" in console.file.getvalue() and "OK" not in console.file.getvalue()


def test_the_fingerprint_tells_config_from_weights(tmp_path):
    weights = {"a": torch.randn(5)}
    one = write_hf(tmp_path / "one", weights)
    first = model_fingerprint(one)
    (one / "config.json").write_text(json.dumps(CONFIG | {"_name_or_path": "x", "torch_dtype": "float16", "pad": None}))
    assert model_fingerprint(one) == first
    (one / "config.json").write_text(json.dumps(CONFIG | {"rms_norm_eps": 1e-6}))
    config = difference(first, model_fingerprint(one))
    assert config.startswith("config.json (") and "weights" not in config
    other = difference(first, model_fingerprint(write_hf(tmp_path / "two", {"a": weights["a"] + 1})))
    assert other.startswith("weights (") and "config" not in other
    assert difference(first, first) == ""
    (one / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json is missing"):
        model_fingerprint(one)


def test_verify_refuses_directories_that_do_not_fit(tmp_path):
    case = Case(tmp_path)
    whole = dict(case.adapted)
    case.adapted = {n: w for n, w in whole.items() if n != "lm_head.weight"}
    with pytest.raises(UserError, match=r"adapted1: lacks 1 tensors .* lm_head.weight"):
        case.verify()
    case.adapted = {**whole, "extra": torch.ones(2)}
    with pytest.raises(UserError, match=r"source: lacks 1 tensors .* extra"):
        case.verify()
    case.adapted = {**whole, Q0: whole[Q0].float()}
    with pytest.raises(UserError, match=rf"{Q0} has dtype F32, in .* BF16"):
        case.verify()
    case.adapted = {**whole, Q0: whole[Q0][:, :-1].contiguous()}
    with pytest.raises(UserError, match=rf"{Q0} has shape \(20, 19\)"):
        case.verify()
    other = write_hf(tmp_path / "another-model", {n: w + 1 for n, w in case.weights.items()})
    with pytest.raises(UserError, match=r"made for model source .* not for another-model"):
        verify(other, case.source, case.shield_path)


def test_tied_models_have_no_head(tmp_path):
    case = Case(tmp_path)
    for weights in (case.weights, case.adapted):
        del weights["lm_head.weight"]
    source = write_hf(tmp_path / "tied", case.weights)
    case.shield.fingerprint = model_fingerprint(source)
    case.shield.save(case.shield_path, overwrite=True)
    assert verify(source, write_hf(tmp_path / "tied-adapted", case.adapted), case.shield_path).ok


def test_fingerprint_ignores_sharding_and_sees_content(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(300, 70, generator=generator), "b": torch.randn(5, generator=generator)}
    weights["c"] = torch.randn(300, 70, generator=generator)
    prints = {model_fingerprint(write_hf(tmp_path / f"s{n}", weights, n)) for n in (1, 2, 3)}
    assert len(prints) == 1
    changes = {
        "dtype": {**weights, "b": weights["b"].view(torch.int32)},
        "first": {**weights, "a": weights["a"] + torch.eye(300, 70) * (torch.arange(300)[:, None] == 0)},
        "middle": {**weights, "a": weights["a"] * 1.001},
        "shape": {**weights, "a": weights["a"].reshape(70, 300)},
        "name": {"d" if n == "c" else n: w for n, w in weights.items()},
        "swap": {**weights, "a": weights["c"], "c": weights["a"]},
        "fewer": {n: w for n, w in weights.items() if n != "b"},
    }
    for name, changed in changes.items():
        prints.add(model_fingerprint(write_hf(tmp_path / name, changed)))
    assert len(prints) == 1 + len(changes)


def test_checkpoint_reads_slices_and_raw_bits(tmp_path):
    weights = {"a": torch.randn(6, 4).to(torch.bfloat16), "b": torch.randn(3), "s": torch.tensor(2.5)}
    checkpoint = HFCheckpoint(write_hf(tmp_path / "m", weights, 2))
    assert checkpoint.names() == ["a", "b", "s"] and "a" in checkpoint and "z" not in checkpoint
    assert (checkpoint.shape("a"), checkpoint.dtype("a")) == ((6, 4), "BF16")
    assert torch.equal(checkpoint.get_slice("a")[2:4, 1:], weights["a"][2:4, 1:])
    assert torch.equal(checkpoint.get("b"), weights["b"])
    np.testing.assert_array_equal(checkpoint.raw("a").view(np.int16), weights["a"].view(torch.int16).numpy())
    assert checkpoint.raw("s").view(np.float32).tolist() == [2.5]
    with pytest.raises(UserError, match="has no tensor z"):
        checkpoint.get("z")


def test_broken_directories(tmp_path):
    weights = {"a": torch.randn(6, 4), "b": torch.randn(3)}
    with pytest.raises(UserError, match="no such directory"):
        HFCheckpoint(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither .* nor"):
        HFCheckpoint(tmp_path / "empty")

    directory = write_hf(tmp_path / "m", weights, 2)
    first, second = sorted(directory.glob("*.safetensors"))
    checkpoint = HFCheckpoint(directory)
    assert {name: checkpoint.entry(name).file for name in checkpoint.names()} == {"a": first, "b": second}
    good = second.read_bytes()
    second.unlink()
    with pytest.raises(UserError, match=rf"{second.name}: missing"):
        model_fingerprint(directory)
    for cut in (0, 4, 20, len(good) - 1):
        second.write_bytes(good[:cut])
        with pytest.raises(UserError, match=rf"{second.name}: (truncated|no safetensors)"):
            model_fingerprint(directory)
    second.write_bytes(good[:8] + b"?" * (len(good) - 8))
    with pytest.raises(UserError, match=rf"{second.name}: no safetensors header"):
        model_fingerprint(directory)
    second.write_bytes(good)
    save_file({"other": weights["b"]}, second)
    with pytest.raises(UserError, match=rf"{second.name}: has no tensor b, though"):
        model_fingerprint(directory)

    index = directory / "model.safetensors.index.json"
    for text in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../m/x"}}', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        with pytest.raises(UserError, match="broken index") as caught:
            HFCheckpoint(directory)
        assert "\n" not in str(caught.value)
