from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_ssu.config.schema import DataSource, Ramp
from megatron_ssu.data.datasets import Parts, Settings
from megatron_ssu.data.prepare import prepare
from megatron_ssu.data.tokenizer import load_tokenizer
from tests.dist.ranks import RankError, Ranks
from tests.unit.data_makers import TEXTS, make_hf_tokenizer, write_jsonl


def blend(folder: str, cache: str) -> list[torch.Tensor]:
    root = Path(folder)
    sources = [
        (root / name, DataSource(name, weight, packing=packing, too_long="truncate"))
        for name, weight, packing in (("a", 2.0, "stream"), ("b", Ramp(1.0, 0.5), "documents"))
    ]
    settings = Settings(16, split="80,20", seed=3, weights_in="tokens")
    parts = Parts(sources, load_tokenizer(root / "model"), settings, cache, with_valid=True)
    train, valid = parts.blend(60)[0], parts.valid(6)
    return [torch.stack([d[i]["tokens"] for i in range(n)]) for d, n in ((train, 60), (valid, 6))]


def test_ranks_see_the_blend_that_one_process_sees(ranks: Ranks, tmp_path: Path) -> None:
    make_hf_tokenizer(tmp_path / "model")
    for name, times in (("a", 30), ("b", 20)):
        documents = [f"{name} {i} {t}" for i in range(times) for t in TEXTS]
        prepare([write_jsonl(tmp_path / f"{name}.jsonl", documents)], tmp_path / name, tmp_path / "model")
    alone = blend(str(tmp_path), str(tmp_path / "alone"))
    for _ in range(2):  # built, then read from the cache
        for train, valid in ranks.run(blend, 2, str(tmp_path), str(tmp_path / "together")):
            assert torch.equal(train, alone[0]) and torch.equal(valid, alone[1])
    (tmp_path / "file").touch()
    with pytest.raises(RankError) as error:
        ranks.run(blend, 2, str(tmp_path), str(tmp_path / "file"), timeout=60)
    assert error.value.kind == "UserError" and "cannot be written" in error.value.message
