"""train.regularize: training pulled towards the source, against an oracle in plain torch on a transformers model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from megatron_ssu.config.schema import RegularizeSection
from megatron_ssu.shield.mask import Mask
from megatron_ssu.shield.shield_file import Shield, load_shield
from megatron_ssu.shield.verify import verify
from tests.dist import regularize_work as work
from tests.dist import resume_work
from tests.dist.ranks import RankError
from tests.dist.test_resume import same
from tests.dist.test_shielded_training import random_shield
from tests.dist.work import GLOBAL_BATCH, mesh
from tests.models import make_model

STEPS = 10
BOTH = {"l2": 0.3, "kl": 0.7, "kl_temperature": 2.0}
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MESHES = {
    "TP1": (1, mesh(), {}),
    "TP2+SP": (2, mesh(2, sequence=True), {"transformer": {"recompute_granularity": "selective"}}),
    "PP2": (2, mesh(1, 2), {"transformer": FULL_RECOMPUTE}),
    "DP2": (2, mesh(), {"ddp": {"overlap_grad_reduce": True, "overlap_param_gather": True}}),
    "PP2xVPP2": (2, mesh(1, 2, 2), {}),
}


def terms(net, source, tokens, labels, mask, temperature):
    """[loss, KL] of micro-batches in a row: their means over tokens that count, and the sums over those of each."""
    logits = net(tokens).logits
    with torch.no_grad():
        truth = log_softmax(source(tokens).logits / temperature, -1)
    losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(mask)
    model = log_softmax(logits / temperature, -1)
    divergence = temperature**2 * kl_div(model, truth, reduction="none", log_target=True).sum(-1)
    by_micro_batch = mask.view(-1, work.MICRO_BATCH * mask.shape[1])
    found = []
    for values in (losses, divergence):
        sums = (values * mask).view_as(by_micro_batch).sum(1)
        found.append(((sums / by_micro_batch.sum(1)).mean(), (sums.sum() / mask.sum()).item()))
    return found


def oracle(model, lrs, *, l2=0.0, kl=0.0, kl_temperature=1.0, shield_file=None):
    """History and weights by name of plain transformers and torch, with frozen entries put back."""
    import transformers

    net, source = (
        transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
        for _ in range(2)
    )
    params = dict(net.named_parameters())
    start = {name: p.detach().clone() for name, p in params.items()}
    masks = load_shield(shield_file).masks if shield_file else {}
    frozen = {n: torch.from_numpy(masks[n].full().copy()) for n in params if n in masks}
    groups = [
        {"params": [p for p in params.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in params.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-4)
    data, history = work.Masked(), []
    for step, lr in enumerate(lrs):
        samples = [data[step * GLOBAL_BATCH + i] for i in range(GLOBAL_BATCH)]
        tokens, labels, mask = (torch.stack([s[k] for s in samples]) for k in ("tokens", "labels", "loss_mask"))
        (loss, shown), (divergence, diverged) = terms(net, source, tokens, labels, mask, kl_temperature)
        distance = sum((p - start[name]).double().square().sum() for name, p in params.items()).item() / 2
        adam.zero_grad()
        (loss + kl * divergence).backward()
        with torch.no_grad():
            for name, p in params.items():
                p.grad += l2 * (p - start[name])
                if name in frozen:
                    p.grad[frozen[name]] = 0
        norm = torch.nn.utils.clip_grad_norm_(params.values(), 0.5)
        for group in adam.param_groups:
            group["lr"] = lr
        adam.step()
        with torch.no_grad():
            for name, bits in frozen.items():
                params[name][bits] = start[name][bits]
        history.append({"loss": shown, "grad_norm": norm.item(), "l2": distance, "kl": diverged})
    return history, {name: p.detach() for name, p in params.items()}


@pytest.mark.parametrize("kind, shielded", [("olmo2", True), ("llama-tied", False)])
def test_training_equals_an_oracle_in_plain_torch(kind, shielded, ranks, tmp_path):
    model = make_model(kind, tmp_path / "model")
    shield = str(random_shield(model, tmp_path / "shield.safetensors")) if shielded else None
    expected = None
    for name, (world, parallel, options) in MESHES.items():
        target = tmp_path / name
        args = (str(model), parallel, STEPS, BOTH, shield, str(target))
        found = ranks.run(work.train_regularized, world, *args, **options)
        history = found[0]["history"]
        expected = expected or oracle(model, [step["lr"] for step in history], shield_file=shield, **BOTH)
        assert expected[0][-1]["l2"] > 0.1 and expected[0][-1]["kl"] > 0.01, "the regularizers must have a say"
        for ours, theirs in zip(history, expected[0], strict=True):
            assert abs(ours["loss"] - theirs["loss"]) < 1e-5, name
            assert abs(ours["kl"] - theirs["kl"]) < 1e-5, name
            assert ours["l2"] == pytest.approx(theirs["l2"], rel=1e-4, abs=1e-9), name
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), name
        weights = load_file(target / "model.safetensors")
        for key, weight in weights.items():
            assert (weight - expected[1][key]).abs().max() < 1e-5, (name, key)
        if shield:
            assert verify(model, target, shield).ok
        # The evaluation is the plain loss, on the same samples as the first step, after all steps.
        assert found[0]["evaluated"] != pytest.approx(history[0]["loss"], abs=1e-3)
        assert all(rank["copies"] == 4 * rank["owned"] for rank in found)


@pytest.mark.parametrize("only", ["l2", "kl"])
def test_one_alone_equals_the_oracle(only, ranks, tmp_path):
    model = make_model("olmo2", tmp_path / "model")
    section = {only: 0.5}
    found = ranks.run(work.train_regularized, 1, str(model), mesh(), STEPS, section, None, str(tmp_path / "out"))[0]
    history, weights = oracle(model, [step["lr"] for step in found["history"]], **section)
    for ours, theirs in zip(found["history"], history, strict=True):
        assert set(ours) == {"loss", "grad_norm", "lr", only}
        assert abs(ours["loss"] - theirs["loss"]) < 1e-5
        assert ours[only] == pytest.approx(theirs[only], rel=1e-4, abs=1e-6)
    for key, weight in load_file(tmp_path / "out" / "model.safetensors").items():
        assert (weight - weights[key]).abs().max() < 1e-5


def test_evaluation_is_the_plain_loss(ranks, tmp_path):
    model = make_model("olmo2", tmp_path / "model")
    plain, pulled = (
        ranks.run(work.train_regularized, 1, str(model), mesh(), 0, section)[0]["evaluated"] for section in ({}, BOTH)
    )
    assert plain == pulled


@pytest.mark.parametrize("parallel", [mesh(2, sequence=True), mesh(1, 2, 2)], ids=["TP2+SP", "PP2xVPP2"])
def test_bf16_runs_and_no_frozen_bit_moves(parallel, ranks, tmp_path):
    model = make_model("olmo2", tmp_path / "model", torch.bfloat16)
    shield, target = random_shield(model, tmp_path / "shield.safetensors"), tmp_path / "out"
    args = (str(model), parallel, STEPS, BOTH, str(shield), str(target))
    history = ranks.run(work.train_regularized, 2, *args, dtype="bf16")[0]["history"]
    assert verify(model, target, shield).ok
    assert history[0]["l2"] == history[0]["kl"] == 0.0  # the same model, the same kernels: the same bits
    assert all(np.isfinite(list(step.values())).all() for step in history)
    assert history[-1]["l2"] > 0 and history[-1]["kl"] > 0


def test_pinned_elements_get_no_pull(ranks, tmp_path):
    """A few frozen rows of the embedding: weight decay moves their bf16 main weights, which never reach the model."""
    model = make_model("olmo2", tmp_path / "model", torch.bfloat16)
    shield = load_shield(random_shield(model, tmp_path / "shield.safetensors"))
    name = "model.embed_tokens.weight"
    rows = Mask.of("row", shield.matrices[name].shape, np.arange(100) < 3)
    pinning = tmp_path / "pinning.safetensors"
    masks = {**shield.masks, name: rows}
    Shield("ssu", model.name, shield.fingerprint, matrices=shield.matrices, masks=masks, granularity="column").save(
        pinning
    )
    parts = ranks.run(work.pull_of_drifted, 1, str(model), str(pinning), 0.5)[0]
    assert any(part["moved"][part["places"]].abs().max() > 0 for part in parts)
    for part in parts:
        assert part["places"].numel() > 0
        expected = 0.5 * part["moved"]
        expected[part["places"]] = 0
        assert torch.equal(part["added"], expected)
        assert part["added"].abs().max() > 0


@pytest.mark.parametrize("dtype, parallel", [("fp32", mesh(2)), ("bf16", mesh(1, 2))], ids=["fp32-TP2", "bf16-PP2"])
def test_a_resumed_run_is_pulled_to_the_source(dtype, parallel, ranks, tmp_path):
    model = make_model("olmo2", tmp_path / "model", {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    shield = str(random_shield(model, tmp_path / "shield.safetensors"))

    def run(directory, iterations=8, **section):
        options = {"iterations": iterations, "regularize": RegularizeSection(**{**BOTH, **section})}
        return resume_work.make_run(str(model), parallel, str(tmp_path / directory), dtype, lr=1e-2, **options)

    # As one run: stopping by train.iterations would change the learning rates.
    quiet = ranks.run(resume_work.train_run, 2, run("quiet"), shield)
    ranks.run(resume_work.train_run, 2, run("split"), shield, kick=(0, 4, 10))
    same(quiet, ranks.run(resume_work.train_run, 2, run("split"), shield), 5)
    with pytest.raises(RankError, match=r"train\.regularize\.l2 was 0\.3 in this checkpoint and is 0\.1 now"):
        ranks.run(resume_work.train_run, 2, run("split", l2=0.1), shield)


def test_nothing_is_there_without_coefficients(ranks, tmp_path):
    """No values, no copies; tests of shielded training compare such a trainer's bits with stock megatron-core's."""
    model = make_model("olmo2", tmp_path / "model")
    found = ranks.run(work.train_regularized, 1, str(model), mesh(), 2, {"kl_temperature": 3.0})[0]
    assert found["copies"] == 0
    assert all(set(step) == {"loss", "grad_norm", "lr"} for step in found["history"])
