"""What large models need of import and export: every byte read once, files written by several ranks, uneven pipelines."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from megatron_ssu.models.hf_export import WRITERS, writing_ranks
from tests.dist import large_work, work
from tests.dist.ranks import RankError
from tests.dist.test_families import TOLERANCE, ids_of, transformers_logits
from tests.dist.work import mesh
from tests.models import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("large") / "model")


def test_replicas_read_nothing_and_have_the_same_weights(model, ranks):
    """TP2 x DP2: ranks 0 and 1 read, 2 and 3 are their replicas."""
    found = ranks.run(large_work.imported, 4, str(model), mesh(2))
    assert [reads > 0 for reads, _ in found] == [True, True, False, False]
    assert found[0][1] == found[2][1] != found[1][1] == found[3][1]
    alone = ranks.run(large_work.imported, 2, str(model), mesh(2))
    assert [digest for _, digest in alone] == [digest for _, digest in found[:2]]


def test_replicas_of_parameters_that_are_sent_alone_have_the_same_weights(model, ranks, monkeypatch):
    from megatron_ssu.models import hf_import

    found = ranks.run(_with_a_small_bucket, 2, str(model))
    assert found[0][0] > 0 == found[1][0] and found[0][1] == found[1][1]
    assert hf_import.BUCKET == 1 << 26


def _with_a_small_bucket(model):
    from megatron_ssu.models import hf_import

    hf_import.BUCKET = 10_000
    return large_work.imported(model, mesh())


def test_files_are_written_by_several_ranks(model, ranks, tmp_path):
    wrote = ranks.run(large_work.exported_by, 4, str(model), mesh(2, 2), str(tmp_path / "out"))
    assert all(len(files) > 1 for files in wrote)
    names = [name for files in wrote for name in files]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    before = load_file(model / "model.safetensors")
    after = {k: v for name in names for k, v in load_file(tmp_path / "out" / name).items()}
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_full_disk_of_one_writer_leaves_nothing_behind(rank, model, ranks, tmp_path):
    with pytest.raises(RankError) as caught:
        ranks.run(large_work.export_on_a_full_disk, 4, str(model), mesh(2, 2), str(tmp_path / "out"), rank)
    assert (
        caught.value.kind == "UserError" and "No space left on device; nothing was left behind" in caught.value.message
    )
    assert not list(tmp_path.iterdir())


def test_writers_are_spread_over_the_job():
    assert writing_ranks(1, 30) == [0] and writing_ranks(4, 30) == [0, 1, 2, 3] and writing_ranks(64, 2) == [0, 32]
    assert writing_ranks(64, 30) == list(range(0, 64, 64 // WRITERS))


def test_an_uneven_pipeline_is_the_same_model(ranks, tmp_path):
    """As 80 layers on four stages are 19, 21, 21, 19: here 10 on four, 2, 3, 3, 2."""
    model = make_model("llama", tmp_path / "model", num_hidden_layers=10)
    ends = {f"num_layers_in_{end}_pipeline_stage": 2 for end in ("first", "last")}
    target = tmp_path / "out"
    ids = ids_of(48)
    found = next(x for x in ranks.run(_uneven, 4, str(model), ends, str(target), ids) if x is not None)
    assert (found - transformers_logits(model, ids)).abs().max() < TOLERANCE
    before, after = load_file(model / "model.safetensors"), load_file(target / "model.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before)


def _uneven(model, ends, target, ids):
    from megatron_ssu.models.parallel_model import open_model

    run = work.run_config(model, mesh(1, 4))
    run.model.transformer.update(ends)
    session = open_model(run)
    assert len(session.chunks[0].decoder.layers) == (2 if session.mesh.pipeline_rank in (0, 3) else 3)
    work.export(session, target)
    return work.logits_of(session, ids)
