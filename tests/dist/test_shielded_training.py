"""Training under a shield: against an oracle in plain torch, against stock megatron-core, and bit by bit."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ssu.models.families import family_of
from megatron_ssu.models.family import Dims
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.shield.mask import Mask
from megatron_ssu.shield.shield_file import Shield, load_shield
from megatron_ssu.shield.verify import verify
from tests.dist import work
from tests.dist.work import mesh
from tests.models import by_file, make_model

STEPS = 20
FULL = mesh(2, 2)


def random_shield(model, path, granularity="column", share=0.5, seed=0):
    """A shield of random units of all linear weights, rows of the embedding and elements of the norms."""
    hf = json.loads((model / "config.json").read_text())
    draw = np.random.default_rng(seed)
    matrices, masks = {}, {}
    for matrix in family_of(hf).matrices(Dims.from_hf(hf)):
        if matrix.scored:
            kind = granularity
        else:
            kind = "element" if len(matrix.shape) == 1 else "row"
        frozen = draw.random(matrix.shape if kind == "element" else matrix.shape[1 if kind == "column" else 0]) < share
        matrices[matrix.name], masks[matrix.name] = matrix, Mask.of(kind, matrix.shape, frozen)
    shield = Shield(
        "ssu", model.name, model_fingerprint(model), matrices=matrices, masks=masks, granularity=granularity
    )
    shield.save(path)
    return path


def frozen_elements(params, shield):
    """bool of the parameter's shape, for those that the shield freezes in part."""
    found = {}
    for name, mask in shield.masks.items():
        tensor, _, rows = name.partition("[")  # rows of a tensor that holds several matrices
        first, stop = map(int, rows.removesuffix("]").split(":")) if rows else (0, None)
        found.setdefault(tensor, torch.zeros(params[tensor].shape, dtype=torch.bool))
        found[tensor][first:stop] = torch.from_numpy(mask.full().copy())
    return found


def oracle(model, shield_file, lrs, *, weight_decay=0.1, clip=0.5):
    """Losses of plain transformers and torch: AdamW, clipping over trainable entries, frozen entries put back."""
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    params = dict(net.named_parameters())
    shield = load_shield(shield_file)
    stored = by_file(net.config, {name: p.detach() for name, p in params.items()})
    frozen = frozen_elements(stored, shield)
    start = {n: stored[n].clone() for n in frozen}
    groups = [
        {"params": [p for p in params.values() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    data, history = work.RandomTokens(), []
    for step, lr in enumerate(lrs):
        samples = [data[step * work.GLOBAL_BATCH + i] for i in range(work.GLOBAL_BATCH)]
        tokens, labels = (torch.stack([s[k] for s in samples]) for k in ("tokens", "labels"))
        loss = torch.nn.functional.cross_entropy(net(tokens).logits.flatten(0, 1), labels.flatten())
        adam.zero_grad()
        loss.backward()
        gradients = by_file(net.config, {name: p.grad for name, p in params.items()})
        for name, mask in frozen.items():
            gradients[name][mask] = 0
        norm = torch.nn.utils.clip_grad_norm_(params.values(), clip)
        for group in adam.param_groups:
            group["lr"] = lr
        adam.step()
        for name, mask in frozen.items():
            stored[name][mask] = start[name][mask]
        history.append((loss.item(), norm.item()))
    return history


@pytest.mark.parametrize("kind", ["olmo2", "llama-tied"])
def test_trainer_equals_an_oracle_in_plain_torch(kind, ranks, tmp_path):
    model = make_model(kind, tmp_path / "model")
    shield = random_shield(model, tmp_path / "shield.safetensors")
    expected = None
    for world, parallel in ((1, mesh()), (8, FULL)):
        found = ranks.run(work.train_steps, world, str(model), parallel, STEPS, shield_file=str(shield))[0]["history"]
        expected = expected or oracle(model, shield, [lr for _, _, lr in found])
        assert any(norm > 0.5 for _, norm in expected), "clipping must be active"
        losses = np.array([(a[0], b[0]) for a, b in zip(found, expected, strict=True)])
        assert np.abs(losses[:, 0] - losses[:, 1]).max() < 1e-5
        norms = np.array([(a[1], b[1]) for a, b in zip(found, expected, strict=True)])
        assert np.allclose(norms[:, 0], norms[:, 1], rtol=1e-4)


@pytest.mark.parametrize("dtype,fused_adam", [("fp32", False), ("bf16", False), ("fp32", True)])
def test_an_empty_shield_gives_the_bits_of_stock_megatron(dtype, fused_adam, ranks, tmp_path):
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    model = make_model("olmo2", tmp_path / "model", torch_dtype)
    options = {"dtype": dtype, "fused_adam": fused_adam}
    results = [
        ranks.run(work.train_steps, 4, str(model), mesh(2), STEPS, stock=stock, **options) for stock in (True, False)
    ]
    for stock, ours in zip(*results, strict=True):
        assert stock["history"] == ours["history"]
        assert all(torch.equal(a, b) for a, b in zip(stock["weights"], ours["weights"], strict=True))


OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.mark.parametrize(
    "granularity,ddp,share",
    # A single bf16 element may round back to where it was; whole columns and rows do not.
    [("column", {}, 0.99), ("column", OVERLAP, 0.99), ("row", {}, 0.99), ("element", OVERLAP, 0.9)],
)
def test_no_frozen_bit_moves_and_the_rest_does(granularity, ddp, share, ranks, tmp_path):
    model = make_model("olmo2", tmp_path / "model", torch.bfloat16)
    shield, target = random_shield(model, tmp_path / "shield.safetensors", granularity), tmp_path / "adapted"
    options = {"dtype": "bf16", "shield_file": str(shield), "target": str(target), "ddp": ddp}
    ranks.run(work.train_steps, 8, str(model), FULL, STEPS, **options)
    report = verify(model, target, shield)
    assert report.ok
    totals = report.totals(granularity)
    assert totals["frozen"] > 0
    assert totals["moved_trainable"] > share * totals["trainable"]
    _flip_one_frozen_bit(target, shield)
    assert not verify(model, target, shield).ok


def _flip_one_frozen_bit(directory, shield_file):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    mask = load_shield(shield_file).masks[name].full()
    row, column = random.Random(0).choice(np.argwhere(mask).tolist())
    bits = tensors[name].view(torch.int16)
    bits[row, column] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("world,parallel", [(1, mesh()), (8, FULL)], ids=["TP1", "TP2xPP2xDP2"])
def test_frozen_elements_cost_no_optimizer_state(world, parallel, ranks, tmp_path):
    model = make_model("olmo2", tmp_path / "model", torch.bfloat16, hidden_size=256, intermediate_size=640)
    shield = random_shield(model, tmp_path / "shield.safetensors")
    results = ranks.run(work.train_steps, world, str(model), parallel, 2, dtype="bf16", shield_file=str(shield))
    for result in results:
        assert result["state_bytes"] == 12 * result["owned"]
    # All that is held beside what trains is padding, at most 15 columns or rows of a matrix, and half of the norms.
    held, trains = (sum(r[key] for r in results) for key in ("owned", "trainable"))
    assert trains < held < 1.12 * trains
