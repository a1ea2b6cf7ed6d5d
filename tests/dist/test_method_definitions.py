"""Methods against their definitions in plain torch and transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_ssu.shield.shield_file import load_shield
from tests.dist import methods_work, work
from tests.dist.work import mesh
from tests.models import make_model

STEPS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("olmo2", tmp_path_factory.mktemp("model") / "m", num_hidden_layers=2)


def net_of(model):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")


def adam_of(net, lr, weight_decay):
    params = list(net.parameters())
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8)


def loss_of(net, samples):
    tokens, labels = (torch.stack([sample[key] for sample in samples]) for key in ("tokens", "labels"))
    return torch.nn.functional.cross_entropy(net(tokens).logits.flatten(0, 1), labels.flatten())


def batch(step):
    data = work.RandomTokens()
    return [data[step * work.GLOBAL_BATCH + i] for i in range(work.GLOBAL_BATCH)]


def inner(name):
    """Whether a weight is neither embedding nor head."""
    return "embed_tokens" not in name and "lm_head" not in name


@torch.no_grad()
def keep_largest(net, fraction):
    """GMT: zero all but the largest gradient elements of each tensor but embedding and head; equal ones stay."""
    for name, weight in net.named_parameters():
        if inner(name):
            size = weight.grad.abs()
            threshold = size.flatten().sort(descending=True).values[int(fraction * size.numel()) - 1]
            weight.grad[size < threshold] = 0


def gmt(model, lrs, fraction, micro_batches):
    """Losses and gradient norms; masked once per step, or after each of `micro_batches` micro-batches."""
    net = net_of(model)
    adam, history = adam_of(net, 1e-3, 0.1), []
    for step, lr in enumerate(lrs):
        adam.zero_grad()
        parts = np.array_split(np.arange(work.GLOBAL_BATCH), micro_batches)
        samples, total = batch(step), 0.0
        for part in parts:
            loss = loss_of(net, [samples[i] for i in part]) / len(parts)
            loss.backward()
            total += loss.item()
            if micro_batches > 1:
                keep_largest(net, fraction)
        if micro_batches == 1:
            keep_largest(net, fraction)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        for group in adam.param_groups:
            group["lr"] = lr
        adam.step()
        history.append((total, norm.item()))
    return history


@pytest.mark.parametrize("parallel", [mesh(), mesh(2, sequence=True), mesh(1, 2), mesh(2, 1)], ids=str)
def test_gmt_masks_the_gradient_of_the_step(ranks, model, parallel):
    world = (
        4
        if parallel == mesh(2, 1)
        else parallel["tensor_model_parallel_size"] * parallel["pipeline_model_parallel_size"]
    )
    found = ranks.run(methods_work.method_steps, world, str(model), parallel, STEPS, "gmt", keep=0.3)[0]["history"]
    expected = gmt(model, [lr for _, _, lr in found], 0.3, 1)
    # An element nearest to a threshold may fall to its other side by rounding.
    assert [step[0] for step in found] == pytest.approx([loss for loss, _ in expected], rel=1e-4)
    assert [step[1] for step in found] == pytest.approx([norm for _, norm in expected], rel=1e-4)


@pytest.mark.parametrize("parallel", [mesh(), mesh(2), mesh(1, 2)], ids=str)
def test_gmt_masks_after_every_micro_batch(ranks, model, parallel):
    world = parallel["tensor_model_parallel_size"] * parallel["pipeline_model_parallel_size"]
    options = {"keep": 0.3, "mask": "micro_batch"}
    found = ranks.run(methods_work.method_steps, world, str(model), parallel, STEPS, "gmt", **options)[0]["history"]
    expected = gmt(model, [lr for _, _, lr in found], 0.3, work.GLOBAL_BATCH // 2)
    assert [step[0] for step in found] == pytest.approx([loss for loss, _ in expected], rel=1e-4)
    assert [step[1] for step in found] == pytest.approx([norm for _, norm in expected], rel=1e-4)
    assert found != ranks.run(methods_work.method_steps, 1, str(model), mesh(), STEPS, "gmt", keep=0.3)[0]["history"]


def lota(model, sparsity, steps, lr, weight_decay):
    """Frozen elements of every tensor but embedding and head."""
    net = net_of(model)
    before = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    adam = adam_of(net, lr, weight_decay)
    for step in range(steps):
        adam.zero_grad()
        loss_of(net, batch(step)).backward()
        adam.step()
    moved = {name: (weight.detach() - before[name]).abs() for name, weight in net.named_parameters() if inner(name)}
    values = torch.cat([part.flatten() for part in moved.values()])
    cut = values.sort(descending=True).values[values.numel() - int(sparsity * values.numel()) - 1]
    return {name: (part < cut).numpy() for name, part in moved.items()}


@pytest.mark.parametrize(("parallel", "world"), [(mesh(), 1), (mesh(2, sequence=True), 4), (mesh(1, 2), 2)], ids=str)
def test_lota_freezes_what_a_probe_moves_least(ranks, model, tmp_path, parallel, world):
    options = {"sparsity": 0.7, "iterations": 3, "lr": 1e-3, "weight_decay": 0.1, "directory": str(tmp_path)}
    ranks.run(methods_work.method_steps, world, str(model), parallel, 2, "lota", **options)
    shield = load_shield(tmp_path / "shield.safetensors", check=True)
    expected = lota(model, 0.7, 3, 1e-3, 0.1)
    assert set(shield.matrices) == set(expected)
    total = sum(part.size for part in expected.values())
    assert sum(shield.counts.values()) == int(0.7 * total)
    same = sum(int((shield.masks[name].full() == frozen).sum()) for name, frozen in expected.items())
    assert same >= 0.999 * total


def test_lota_begins_anew_from_the_source(ranks, model, tmp_path):
    """After the probe the first step's loss is the source model's."""
    options = {"sparsity": 0.7, "iterations": 3, "lr": 1e-2, "directory": str(tmp_path)}
    found = ranks.run(methods_work.method_steps, 1, str(model), mesh(), 1, "lota", **options)[0]["history"]
    assert found[0][0] == pytest.approx(loss_of(net_of(model), batch(0)).item(), rel=1e-5)
