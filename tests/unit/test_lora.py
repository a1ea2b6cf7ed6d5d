"""What the method lora refuses, and what its shield says."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from megatron_ssu.adapters.freeze import adapter_shield, check_base, with_frozen_bases
from megatron_ssu.adapters.matrix import draw
from megatron_ssu.adapters.settings import TARGETS, AdapterSettings
from megatron_ssu.errors import UserError
from megatron_ssu.methods.lora import LowRankAdaptation
from megatron_ssu.methods.registry import method_of, read_run
from megatron_ssu.models.matrix import Matrix
from megatron_ssu.shield.mask import Mask
from megatron_ssu.shield.shield_file import Shield

Q = Matrix("model.layers.0.self_attn.q_proj.weight", (8, 6), 0, "q_proj")
DOWN = Matrix("model.layers.0.mlp.down_proj.weight", (6, 10), 0, "down_proj")
NORM = Matrix("model.norm.weight", (6,), None, "norm")
EMBEDDING = Matrix("model.embed_tokens.weight", (12, 6), None, "embedding")
ALL = [Q, DOWN, NORM, EMBEDDING]


def run_with(tmp_path, *overrides):
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: model}\ncheckpoint: {directory: run}\nmethod: {name: lora, lora: {rank: 4}}\n")
    return read_run(file, overrides)


@pytest.mark.parametrize(
    "override,words",
    [
        ("method.lora.rank=0", ["method.lora.rank", "0"]),
        ("method.lora.alpha=0", ["method.lora.alpha", "above 0"]),
        ("method.lora.targets=[q_proj,w_proj]", ["method.lora.targets", "'w_proj'", "down_proj"]),
        ("method.lora.targets=[]", ["method.lora.targets", "none"]),
        ("shield.file=some.safetensors", ["shield.file", "lora"]),
        ("method.lora.shielded=true method.lora.dora=true", ["method.lora.dora", "method.lora.shielded"]),
        ("method.lora.shielded=true shield.granularity=element", ["shield.granularity", "column or row", "'element'"]),
        ("method.lora.ranks=4", ["method.lora.ranks", "rank"]),
    ],
)
def test_bad_options_are_refused_in_one_line(override, words, tmp_path):
    with pytest.raises(UserError) as error:
        run = run_with(tmp_path, *override.split())
        method_of(run).validate(run, ALL)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_options_become_settings(tmp_path):
    run = run_with(tmp_path, "method.lora.targets=[down_proj,q_proj]", "method.lora.rslora=true", "method.lora.rank=16")
    method = method_of(run)
    assert isinstance(method, LowRankAdaptation)
    assert method.settings == AdapterSettings(rank=16, targets=("q_proj", "down_proj"), rslora=True)
    assert method.settings.scale == 8 and AdapterSettings(rank=16, alpha=8).scale == 0.5


def base_shield(granularity):
    units = {"column": 6, "row": 8, "element": (8, 6)}[granularity]
    masks = {
        Q.name: Mask.of(granularity, Q.shape, np.arange(np.prod(units)).reshape(units) % 2 == 0),
        EMBEDDING.name: Mask.of("row", EMBEDDING.shape, np.arange(12) < 2),
    }
    return Shield("ssu", "m", "f", matrices={m.name: m for m in (Q, EMBEDDING)}, masks=masks)


def test_shield_freezes_what_has_no_adapter():
    settings = AdapterSettings(targets=("q_proj",))
    shield = adapter_shield(ALL, settings, model="m", fingerprint="f")
    assert shield.counts == {Q.name: 0, **{m.name: m.elements for m in (DOWN, NORM, EMBEDDING)}}
    assert adapter_shield(ALL, settings, model="m", fingerprint="f", embeddings=True).counts[EMBEDDING.name] == 0
    assert with_frozen_bases(shield, ALL, settings).counts == {m.name: m.elements for m in ALL}


@pytest.mark.parametrize("granularity", ["column", "row"])
def test_shield_beside_another_has_its_masks(granularity):
    base, settings = base_shield(granularity), AdapterSettings()
    shield = adapter_shield(ALL, settings, model="m", fingerprint="f", embeddings=True, base=base)
    assert shield.counts == {Q.name: 24, DOWN.name: 0, EMBEDDING.name: 12, NORM.name: 6}
    assert np.array_equal(shield.masks[Q.name].full(), base.masks[Q.name].full())
    check_base(base, ALL, settings)


def test_shield_by_element_is_refused():
    with pytest.raises(UserError, match=r"q_proj\.weight must be frozen by column or row .*, got by element"):
        check_base(base_shield("element"), ALL, AdapterSettings())
    check_base(base_shield("element"), ALL, AdapterSettings(targets=("down_proj",)))


def test_start_follows_from_seed_and_name():
    first = draw(Q.name, (4, 64), 1)
    assert torch.equal(first, draw(Q.name, (4, 64), 1))
    assert not torch.equal(first, draw(DOWN.name, (4, 64), 1)) and not torch.equal(first, draw(Q.name, (4, 64), 2))
    many = draw("x", (100, 64), 1)
    assert many.abs().max() <= 1 / 8 and many.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.02)


def test_run_files_are_read_without_torch():
    code = "import sys; import megatron_ssu.methods.lora; print('torch' in sys.modules, 'megatron.core' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    assert set(TARGETS) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
