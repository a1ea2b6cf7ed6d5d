"""What large models need: weights read once, files written by several ranks, stages of different numbers of layers."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.dist import large_work, work
from tests.dist.ranks import RankError
from tests.dist.work import mesh
from tests.models import make_model

SMALL = 10_000  # bytes at a time: less than an embedding of 25,600 bytes, more than several norms


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("olmo2", tmp_path_factory.mktemp("models") / "olmo2")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    "world,parallel,replicas",
    [
        (3, mesh(), 3),
        (4, mesh(2), 2),
        (4, mesh(1, 2, 2), 2),
        (4, mesh() | {"context_parallel_size": 2}, 4),
    ],
    ids=["DP3", "TP2xDP2", "PP2xVPP2xDP2", "CP2xDP2"],
)
def test_every_parameter_is_read_by_one_replica(world, parallel, replicas, ranks, model):
    found = ranks.run(large_work.read_parameters, world, str(model), parallel, SMALL)
    for place in {rank["place"] for rank in found}:
        shards = [rank for rank in found if rank["place"] == place]
        assert len(shards) == replicas and len({shard["digest"] for shard in shards}) == 1
        assert all(shard["read"] for shard in shards), "all of them read"
        assert sorted(name for shard in shards for name in shard["read"]) == sorted(shards[0]["all"])
    alone = ranks.run(large_work.read_parameters, world // replicas, str(model), _without(parallel), 10**9)
    assert {rank["place"]: rank["digest"] for rank in found} == {rank["place"]: rank["digest"] for rank in alone}


def _without(parallel):
    """The same mesh with one replica."""
    return parallel | {"context_parallel_size": 1}


@pytest.mark.parametrize("loser", [0, 1])
def test_a_file_that_one_rank_cannot_read_ends_all(loser, ranks, tmp_path):
    model = make_model("llama", tmp_path / "model")
    with pytest.raises(RankError) as caught:
        ranks.run(large_work.lose_a_file, 2, str(model), mesh(), loser, timeout=120)
    assert caught.value.kind == "UserError" and caught.value.agreed
    assert f"model-{loser}/model.safetensors" in caught.value.message and "\n" not in caught.value.message


def test_the_files_are_the_same_whatever_ranks_write_them(ranks, model, tmp_path):
    source = tensors_of(model)
    cases = {
        "one": (1, mesh(), 10**9, None),
        "TP2": (2, mesh(2), SMALL, None),
        "TP2xDP2, one writer": (4, mesh(2), SMALL, 1),
        "TP2xDP2, three writers": (4, mesh(2), SMALL, 3),
        "PP2xVPP2xDP2": (4, mesh(1, 2, 2), SMALL, None),
    }
    for name, (world, parallel, size, writers) in cases.items():
        target = tmp_path / name
        wrote = ranks.run(large_work.export_by, world, str(model), parallel, str(target), 100_000, size, writers)
        files = sorted(file.name for file in target.glob("*.safetensors"))
        assert len(files) >= 4
        assert sorted(file for rank in wrote for file in rank) == files
        assert len([rank for rank in wrote if rank]) == min(world, writers or world)
        exported = tensors_of(target)
        assert exported.keys() == source.keys()
        assert all(torch.equal(exported[tensor], value) for tensor, value in source.items())
        assert not [file.name for file in target.iterdir() if file.name.startswith(".")]
        same, *others = filecmp.cmpfiles(tmp_path / "one", target, [*files, "model.safetensors.index.json"], False)
        assert len(same) == len(files) + 1 and others == [[], []]


def test_small_tensors_are_collected_together(ranks, model, tmp_path):
    assert len(tensors_of(model)) > 40
    assert ranks.run(large_work.count_exchanges, 4, str(model), mesh(2, 2), str(tmp_path / "out")) == [1] * 4


@pytest.mark.parametrize("limited", [0, 1])
def test_a_writer_that_fails_ends_all_and_leaves_nothing(limited, ranks, model, tmp_path):
    with pytest.raises(RankError) as caught:
        ranks.run(
            large_work.export_with_a_limit, 2, str(model), str(tmp_path / "out"), 100_000, limited, 50_000, timeout=120
        )
    assert caught.value.kind == "UserError" and caught.value.agreed
    assert "out: cannot be written: File too large; nothing was left behind" in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_ranks_of_other_disks_do_not_write(ranks, model, tmp_path):
    wrote = ranks.run(large_work.export_on_own_disks, 3, str(model), str(tmp_path), 100_000, [0, 2])
    assert wrote[0] and wrote[2] and not wrote[1]
    exported, source = tensors_of(tmp_path / "shared" / "out"), tensors_of(model)
    assert exported.keys() == source.keys()
    assert all(torch.equal(exported[name], value) for name, value in source.items())
    assert list((tmp_path / "own1").iterdir()) == []


FIRST, LAST = ({f"num_layers_in_{end}_pipeline_stage": 1} for end in ("first", "last"))
BOTH = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
UNEVEN = {
    "first": (2, mesh(1, 2), {}, FIRST, [1, 3]),
    "last": (4, mesh(2, 2), {}, LAST, [3, 3, 1, 1]),
    "both": (3, mesh(1, 3), {}, FIRST | LAST, [1, 2, 1]),
    "accounted": (3, mesh(1, 3), {}, BOTH, [1, 2, 1]),
    "four": (4, mesh(1, 4), {"num_hidden_layers": 10}, dict.fromkeys(FIRST | LAST, 2), [2, 3, 3, 2]),
    "virtual": (2, mesh(1, 2, 2), {"num_hidden_layers": 6}, {"num_layers_in_first_pipeline_stage": 2}, [2, 4]),
    "accounted-virtual": (2, mesh(1, 2, 2), {"num_hidden_layers": 6}, BOTH, [3, 3]),
}


@pytest.mark.parametrize("name", UNEVEN)
@pytest.mark.parametrize("kind", [pytest.param("olmo2", marks=pytest.mark.slow), "llama-tied"])
def test_uneven_stages_compute_the_same(kind, name, ranks, tmp_path):
    import transformers

    world, parallel, sizes, fields, layers = UNEVEN[name]
    model = make_model(kind, tmp_path / "model", **sizes)
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    ids = torch.randint(0, work.VOCAB, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(ids).logits
    run = large_work.make_run(str(model), parallel, fields)
    found = ranks.run(large_work.uneven, world, run, ids, str(tmp_path / "out"))
    assert [count for count, _ in found] == layers
    logits = next(x for _, x in found if x is not None)
    assert (logits - expected).abs().max() < 2e-4
    exported, source = tensors_of(tmp_path / "out"), tensors_of(model)
    assert exported.keys() == source.keys()
    assert all(torch.equal(exported[tensor], value) for tensor, value in source.items())
