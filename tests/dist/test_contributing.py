"""The worked examples of docs/extending.md: a score, a method and a family, each a new file and a line."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_ssu.shield.verify import verify
from tests.dist import contributing_work as work
from tests.dist.test_methods import ROOT, make_world
from tests.models import SIZES

BLOCKS = {
    block.partition("\n")[0].removeprefix("# "): block
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("contributing"))


def test_the_examples_are_new_files():
    assert len(BLOCKS) == 3 and not [path for path in BLOCKS if (ROOT / path).exists()]


def test_a_score(ranks, world):
    """Against the definition, from the statistics of the inputs, which other tests check."""
    overrides = [
        f"model.path={world / 'hf' / 'source'}",
        f"shield.calibration.path={world / 'world' / 'chat.jsonl'}",
        *("shield.score=energy", "shield.calibration.samples=20", f"checkpoint.directory={world / 'scored'}"),
    ]
    found = ranks.run(work.score, 1, BLOCKS, str(ROOT / "examples" / "methods" / "ssu.yaml"), overrides)[0]
    weights = load_file(world / "hf" / "source" / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    # k's inputs are those of q, for which they are kept
    norm = found[
        "input_norm/column/"
        + next(n for n in (name, name.replace("k_proj", "q_proj")) if f"input_norm/column/{n}" in found)
    ]
    squares = weights[name].double().numpy() ** 2
    assert np.allclose(found[f"energy/column/{name}"], squares.sum(0) * norm**2, rtol=1e-6)
    assert np.allclose(found[f"energy/row/{name}"], (squares * norm**2).sum(1), rtol=1e-6)


def test_a_method(ranks, world):
    file, folder = world / "norms.yaml", world
    text = (ROOT / "examples" / "methods" / "none.yaml").read_text()
    file.write_text(text.replace("name: none", "name: norms\n  norms: {head: true}"))
    straight, resumed = ranks.run(work.method_run, 1, BLOCKS, str(file), str(folder), [], "norms")[0]
    assert straight["losses"] == resumed["losses"]
    report = verify(world / "hf" / "source", world / "out" / "norms", world / "runs" / "norms" / "shield.safetensors")
    assert report.status == 0
    before, after = (load_file(world / path / "model.safetensors") for path in ("hf/source", "out/norms"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "norm" in name or "lm_head" in name}


def test_a_family(ranks, tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.SeedOssConfig(**SIZES, head_dim=16)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_((1 if weight.ndim == 1 else 0) + 0.08 * torch.randn_like(weight))
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(0, SIZES["vocab_size"], (2, 48))
    with torch.no_grad():
        expected = model.eval()(ids).logits
    found = ranks.run(work.logits, 1, BLOCKS, str(tmp_path / "model"), ids)[0]
    assert (found - expected).abs().max() < 2e-4 and expected.std() > 0.1
