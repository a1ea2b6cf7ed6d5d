"""Logits against transformers, and import followed by export, on meshes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.dist import work
from tests.dist.work import mesh
from tests.models import KINDS, make_model

MESHES = {
    "TP1": (1, mesh()),
    "TP2": (2, mesh(2)),
    "TP2+SP": (2, mesh(2, sequence=True)),
    "TP4": (4, mesh(4)),
    "TP4+SP": (4, mesh(4, sequence=True)),
    "TP2xPP2": (4, mesh(2, 2)),
    "TP2xPP2+SP": (4, mesh(2, 2, sequence=True)),
    "PP2xVPP2": (2, mesh(1, 2, 2)),
}


FEW = ("TP1", "TP2xPP2+SP", "PP2xVPP2")


@pytest.mark.parametrize(
    "kind,meshes",
    [
        pytest.param("olmo2", FEW, id="olmo2-few"),
        *(pytest.param(kind, tuple(MESHES), id=kind, marks=pytest.mark.slow) for kind in KINDS),
    ],
)
def test_logits_equal_transformers(kind, meshes, ranks, tmp_path):
    import transformers

    model = make_model(kind, tmp_path / kind)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.randint(0, work.VOCAB, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(ids).logits
    assert expected.std() > 0.1
    for name in meshes:
        world, parallel = MESHES[name]
        found = next(x for x in ranks.run(work.logits, world, str(model), parallel, ids) if x is not None)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 2e-4, name


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["olmo2", "llama-tied", "llama"])
def test_import_then_export_gives_every_bit_back(kind, dtype, ranks, tmp_path):
    import transformers

    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    model = make_model(kind, tmp_path / "model", torch_dtype, max_shard_size="150KB")
    source = {k: v for file in model.glob("*.safetensors") for k, v in load_file(file).items()}
    assert len(list(model.glob("*.safetensors"))) > 1
    for name in ("TP1", "TP2xPP2+SP", "TP4", "PP2xVPP2"):
        world, parallel = MESHES[name]
        target = tmp_path / name
        ranks.run(work.convert, world, str(model), parallel, dtype, str(target), 10**9)
        exported = load_file(target / "model.safetensors")
        assert exported.keys() == source.keys()
        for tensor, value in source.items():
            assert exported[tensor].dtype == value.dtype
            assert torch.equal(exported[tensor].view(torch.uint8), value.view(torch.uint8)), (name, tensor)
        assert json.loads((target / "config.json").read_text()) == json.loads((model / "config.json").read_text())
        assert (target / "generation_config.json").exists()
    transformers.AutoModelForCausalLM.from_pretrained(target)


def test_export_keeps_to_the_shard_size_and_indexes(ranks, tmp_path):
    import transformers

    model, target = make_model("olmo2", tmp_path / "model"), tmp_path / "out"
    ranks.run(work.convert, 2, str(model), mesh(2), "fp32", str(target), 200_000)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    sizes = []
    for file in files:
        with safe_open(target / file, "pt") as opened:
            assert {k for k, f in index["weight_map"].items() if f == file} == set(opened.keys())
            sizes.append(sum(opened.get_tensor(k).nbytes for k in opened.keys()))  # noqa: SIM118
    assert max(sizes) <= 200_000
    assert sum(sizes) == index["metadata"]["total_size"]
    before = transformers.AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = transformers.AutoModelForCausalLM.from_pretrained(target).state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_export_does_not_overwrite(ranks, tmp_path):
    from tests.dist.ranks import RankError

    model, target = make_model("olmo2", tmp_path / "model"), tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("x")
    with pytest.raises(RankError) as caught:
        ranks.run(work.convert, 2, str(model), mesh(2), "fp32", str(target), 10**9)
    assert caught.value.kind == "UserError"
    assert "not overwritten" in caught.value.message
    assert [p.name for p in target.iterdir()] == ["precious"]
