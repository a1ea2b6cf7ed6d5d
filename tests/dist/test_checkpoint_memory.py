"""Host memory of saving and loading: a rank's own part of the state, and nothing afterwards; of import and export: portions."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_ssu.estimate.estimate import estimate
from megatron_ssu.shield.shield_file import load_shield
from tests.dist import memory_work, resume_work
from tests.dist.test_shielded_training import random_shield
from tests.dist.work import mesh
from tests.models import make_model

RANKS = 2


@pytest.mark.skipif(not memory_work.can_measure(), reason="/proc/self/clear_refs cannot be written")
@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_a_rank_holds_its_own_part_and_keeps_nothing(background, ranks, tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 512}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    model = make_model("olmo2", tmp_path / "model", torch.bfloat16, **sizes, **heads)
    shield = random_shield(model, tmp_path / "shield.safetensors")
    found = ranks.run(memory_work.measure, RANKS, str(model), str(shield), str(tmp_path / "run"), background)
    for rank in found:
        # Half of the model trains: a rank writes 12 / 2 / 2 bytes of fp32 state and 2 / 2 of weights per parameter.
        assert rank["save_peak"] < 7 * rank["parameters"], rank
        assert rank["load_peak"] < 6 * rank["parameters"], rank
        assert rank["save_left"] < 2**16 and rank["load_left"] < 2**16, rank
    run = resume_work.make_run(str(model), mesh(), str(tmp_path / "run"), "bf16", async_save=background)
    hf = json.loads((model / "config.json").read_text())
    host = estimate(run, hf, RANKS, shield=load_shield(shield), engine=False).host
    files = [f.stat().st_size for f in sorted((tmp_path / "run" / "checkpoints" / "iter_0000001").glob("*.distcp"))]
    assert len(files) == RANKS and min(files) > 0.9 * max(files), "the ranks write alike"
    assert host.stored == host.saving == pytest.approx(sum(files), rel=0.02) and host.background == background


@pytest.mark.skipif(not memory_work.can_measure(), reason="/proc/self/clear_refs cannot be written")
def test_import_and_export_hold_portions(ranks, tmp_path):
    """Of a model whose largest tensor has 256 MiB; libraries' first collectives and threads take a few MiB of their own."""
    sizes = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 131072}
    model = make_model("llama", tmp_path / "model", torch.bfloat16, **sizes)
    found = ranks.run(memory_work.convert, RANKS, str(model), str(tmp_path / "out"), 10**9)
    run = resume_work.make_run(str(model), mesh(), str(tmp_path / "run"), "bf16")
    host = estimate(run, json.loads((model / "config.json").read_text()), RANKS, engine=False).host
    libraries = 16 * 2**20
    for rank in found:
        assert rank["import"] < host.importing / RANKS + libraries, rank
    assert found[0]["export"] < host.exporting + libraries, "it writes"
    assert found[1]["export"] < libraries, "it has nothing to send to a rank that holds the same"
    assert found[0]["export"] > host.exporting / 4, "it does hold portions"
