"""The dial: models between two, bit for bit where both agree; points, front and choice; the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_ssu import cli
from megatron_ssu.commands.dial import places
from megatron_ssu.errors import UserError
from megatron_ssu.evaluate.dial import GROUPS, between, groups_of, write_point
from megatron_ssu.evaluate.front import Point, choose, forgetting, front
from megatron_ssu.evaluate.measured import Measured, ratio
from megatron_ssu.evaluate.plots import plane_figure
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.hf_files import HFCheckpoint
from megatron_ssu.models.source import open_source
from megatron_ssu.shield import pack_file
from megatron_ssu.shield.mask import Mask
from megatron_ssu.shield.shield_file import Shield
from megatron_ssu.shield.verify import verify
from tests.models import make_model
from tests.unit.data_makers import TEXTS, make_hf_tokenizer, write_jsonl

INT = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


def make_pair(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16, **sizes):
    """A model, and itself with half of the columns of every matrix moved; and the shield that says so."""
    import transformers

    source = make_model(kind, folder / "source", dtype, num_hidden_layers=2, vocab_size=321, **sizes)
    make_hf_tokenizer(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            moved = weight.float() + 0.05 * torch.randn_like(weight.float())
            weight[..., ::2] = moved[..., ::2].to(dtype)
    model.save_pretrained(folder / "adapted", max_shard_size="60KB")
    shutil.copy(source / "tokenizer.json", folder / "adapted")
    shutil.copy(source / "tokenizer_config.json", folder / "adapted")
    shutil.copy(source / "chat_template.jinja", folder / "adapted")
    opened = open_source(source)
    matrices = {m.name: m for m in opened.family.matrices(opened.dims)}
    masks = {}
    for name, m in matrices.items():
        frozen = np.arange(m.shape[-1]) % 2 == 1
        masks[name] = Mask.of("element" if len(m.shape) == 1 else "column", m.shape, frozen)
    Shield("ssu", "source", model_fingerprint(source), matrices, masks).save(folder / "shield.safetensors")
    return opened, HFCheckpoint(folder / "adapted")


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {n: w for file in sorted(directory.glob("*.safetensors")) for n, w in load_file(file).items()}


@pytest.mark.parametrize("chunk", [1 << 24, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["llama-tied", "phi3"])
def test_points_are_between_and_frozen_weights_stay(tmp_path, monkeypatch, kind, dtype, chunk):
    monkeypatch.setattr(pack_file, "_CHUNK", chunk)
    source, adapted = make_pair(tmp_path, kind, dtype)
    a, b = weights(tmp_path / "source"), weights(tmp_path / "adapted")
    for alpha in (0.0, 0.3, 1.0):
        path = tmp_path / f"at-{alpha}"
        write_point(source, adapted, dict.fromkeys(GROUPS, alpha), path)
        found = weights(path)
        for name, w in found.items():
            expected = (a[name].double() + alpha * (b[name].double() - a[name].double())).to(dtype)
            if alpha in (0.0, 1.0):
                assert torch.equal(w.view(INT[dtype]), (b if alpha else a)[name].view(INT[dtype])), name
            assert torch.allclose(
                w.double(), expected.double(), rtol=2**-7 if dtype is torch.bfloat16 else 1e-6, atol=0
            ), name
        report = verify(tmp_path / "source", path, tmp_path / "shield.safetensors")
        assert report.ok and any(m.moved_trainable for m in report.matrices) == (alpha > 0)
    record = json.loads((tmp_path / "at-0.3" / "megatron-ssu.json").read_text())
    assert record["alphas"]["mlp"] == 0.3 and record["adapted"]["fingerprint"] == model_fingerprint(
        tmp_path / "adapted"
    )


def test_a_group_is_dialled_alone(tmp_path):
    source, adapted = make_pair(tmp_path)
    groups = groups_of(source)
    assert set(groups.values()) == set(GROUPS)
    assert groups["model.layers.0.self_attn.o_proj.weight"] == "attention" and groups["lm_head.weight"] == "embeddings"
    write_point(source, adapted, dict.fromkeys(GROUPS, 1.0) | {"mlp": 0.0}, tmp_path / "out")
    a, b, found = (weights(tmp_path / name) for name in ("source", "adapted", "out"))
    for name, w in found.items():
        assert torch.equal(w, (a if groups[name] == "mlp" else b)[name]), name


def test_bits_that_agree_stay():
    """Of a NaN with a payload, and of -0.0, which arithmetic would not keep."""
    a = np.array([[0x7FC1, 0x8000, 0x3F80, 0x3F80]], dtype=np.uint16)
    b = np.array([[0x7FC1, 0x8000, 0x3F80, 0x4000]], dtype=np.uint16)
    assert between(a, b, 0.5, "BF16", "w").tolist() == [[0x7FC1, 0x8000, 0x3F80, 0x3FC0]]  # 1 and 2: 1.5
    with pytest.raises(UserError, match="w: must be of F32, BF16, F16 to be dialled, got I64"):
        between(a, b, 0.5, "I64", "w")


def test_places():
    assert [place.name for place in places(5, False)] == ["0", "0.25", "0.5", "0.75", "1"]
    per_kind = places(3, True)
    assert [place.name for place in per_kind][:3] == ["0", "attention 0", "attention 0.5"] and per_kind[-1].name == "1"
    assert per_kind[2].alphas == {"attention": 0.5, "mlp": 1, "embeddings": 1, "norms": 1}
    assert [place.end for place in per_kind] == ["source", *[None] * 8, "adapted"]


def make_point(name, source, target):
    figures = (ratio("s", "loss", "lower", [source]), ratio("t", "acc", "higher", [target]))
    return Point(name, {}, *figures, figures)


def test_front_and_choice():
    points = [
        make_point(*p) for p in (("0", 2.0, 0.1), ("a", 2.02, 0.3), ("b", 2.05, 0.2), ("c", 2.2, 0.5), ("d", 2.2, 0.4))
    ]
    assert [p.name for p in front(points)] == ["0", "a", "c"]
    assert forgetting(points, points[3]).percent == pytest.approx(10)
    assert [choose(points, keep).name for keep in (0, 0.5, 3, 10.1)] == ["0", "0", "a", "c"]
    figure = plane_figure(points, points[1])
    axes = figure.axes[0]
    assert axes.xaxis_inverted() and not axes.yaxis_inverted() and "s: loss (lower is better)" in axes.get_xlabel()
    none = Point("0", {}, Measured("s", "acc", 0.0, "higher"), points[0].target, ())
    with pytest.raises(UserError, match="--source-figure: s:acc is 0 of the source"):
        forgetting([none, none], none)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    return ended.value.code


def test_the_command(tmp_path, capfd):
    make_pair(tmp_path, dtype=torch.float32)
    for name, texts in (("source", TEXTS), ("target", TEXTS[::-1])):
        write_jsonl(tmp_path / f"{name}.jsonl", texts)
    ends = ("--source", tmp_path / "source", "--adapted", tmp_path / "adapted")
    texts = ("--texts", *(f"{name}={tmp_path / name}.jsonl" for name in ("source", "target")))
    out = ("--output", tmp_path / "out", "--export", tmp_path / "chosen")
    assert run("dial", *ends, *texts, "--steps", 3, "--choose", "0.5", *out) == 0
    assert (tmp_path / "out" / "front.png").stat().st_size > 5000 and not (tmp_path / "out" / ".point").exists()
    points = [json.loads(line) for line in (tmp_path / "out" / "points.jsonl").read_text().splitlines()]
    assert [point["point"] for point in points] == ["0", "0.5", "1"] and "chosen" in points[1]["marks"]
    assert points[0]["forgetting"] == 0
    assert verify(tmp_path / "source", tmp_path / "chosen", tmp_path / "shield.safetensors").ok
    assert "0.5 exported" in capfd.readouterr().out
    before = sorted(tmp_path.rglob("*"))
    for options, line in (
        ((*ends, *texts, *out), "--export: "),
        ((*ends, *texts, *out[:2], "--choose", "0.4"), "--choose: must be one of 0, 0.25, 0.5, 0.75, 1, got '0.4'"),
        ((*ends, *texts, *out[:2], "--steps", 1), "--steps: must be at least 2, got 1"),
        ((*ends, *texts, *out[:2], "--source-figure", "x"), "--source-figure: must be DATA:METRIC"),
        ((*ends, *texts, *out[:2], "--target-figure", "x:y"), "--target-figure: x:y is not measured; there are source:loss"),
        ((*ends, *out[:2]), "nothing to measure"),
    ):  # fmt: skip
        assert run("dial", *options) == 2
        assert line in capfd.readouterr().err.splitlines()[-1]
        assert sorted(tmp_path.rglob("*")) == before
