"""LoRA and DoRA on meshes: against plain torch, as a merged export and as a PEFT directory, beside a shield, resumed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_ssu.adapters.matrix import draw
from megatron_ssu.adapters.settings import AdapterSettings
from megatron_ssu.shield.shield_file import load_shield
from tests.dist import adapters_work, work
from tests.dist.adapters_work import CLIP, DECAY, LR
from tests.dist.test_shielded_training import OVERLAP, random_shield
from tests.dist.work import mesh
from tests.models import make_model

STEPS = 10
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MESHES = {
    "TP1": (1, mesh(), {}),
    "TP2": (2, mesh(2), {}),
    "TP2+SP": (2, mesh(2, sequence=True), {}),
    "TP2xDP2, overlap": (4, mesh(2), {"ddp": OVERLAP}),
    "PP2": (2, mesh(1, 2), {}),
    "PP2xVPP2, full recompute": (2, mesh(1, 2, 2), {"transformer": FULL}),
}
SETTINGS = {
    "lora": AdapterSettings(rank=4, alpha=8),
    "dora": AdapterSettings(rank=4, alpha=6, dora=True),
    "some": AdapterSettings(rank=3, alpha=6, targets=("k_proj", "o_proj", "up_proj"), rslora=True),
}
IDS = torch.randint(0, work.VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))


class PlainAdapter(torch.nn.Module):
    """LoRA and DoRA as their papers define them, on a linear layer without bias."""

    def __init__(self, name, base, settings, open_columns=None, open_rows=None):
        super().__init__()
        self.weight, self.settings = base.weight.requires_grad_(False), settings
        self.scale = settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)
        rows, columns = self.weight.shape
        self.open = torch.ones(rows, columns, dtype=torch.bool)
        if open_columns is not None:
            self.open &= open_columns
        self.a = torch.nn.Parameter(draw(name, (settings.rank, columns), settings.seed) * self.open.any(0))
        self.b = torch.nn.Parameter(torch.zeros(rows, settings.rank))
        self.m = torch.nn.Parameter(self.weight.norm(dim=1)) if settings.dora else None

    def adapted(self):
        summed = self.weight + self.scale * (self.b @ self.a) * self.open
        if self.m is None:
            return summed
        return (self.m / summed.norm(dim=1).detach())[:, None] * summed

    def forward(self, x):
        return torch.nn.functional.linear(x, self.adapted())


def plain(model, settings, shield_file=None, embeddings=False):
    """The model in transformers with adapters; adapters by the name of the module."""
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    shield = load_shield(shield_file) if shield_file else None
    for name, p in net.named_parameters():
        p.requires_grad_(embeddings and name in ("model.embed_tokens.weight", "lm_head.weight"))
    found = {}
    for name, module in list(net.named_modules()):
        if name.rpartition(".")[2] in settings.targets:
            columns = None
            if shield is not None:
                columns = ~torch.from_numpy(shield.masks[f"{name}.weight"].columns())
            found[name] = PlainAdapter(f"{name}.weight", module, settings, columns)
            parent, _, last = name.rpartition(".")
            setattr(net.get_submodule(parent), last, found[name])
    return net, found


def oracle(net, lrs):
    """Losses and gradient norms of AdamW with clipping over what trains, in plain torch."""
    params = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8)
    data, history = work.RandomTokens(), []
    for step, lr in enumerate(lrs):
        samples = [data[step * work.GLOBAL_BATCH + i] for i in range(work.GLOBAL_BATCH)]
        tokens, labels = (torch.stack([s[k] for s in samples]) for k in ("tokens", "labels"))
        loss = torch.nn.functional.cross_entropy(net(tokens).logits.flatten(0, 1), labels.flatten())
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, CLIP)
        for group in adam.param_groups:
            group["lr"] = lr
        adam.step()
        history.append((loss.item(), norm.item()))
    return np.array(history)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("olmo2", tmp_path_factory.mktemp("model") / "model")


def first(found, key):
    return next(x[key] for x in found if x[key][0] is not None)


@pytest.fixture(scope="module")
def expected():
    """By model and kind of settings: the base's logits, plain torch's history, its logits after training, its adapters."""
    made = {}

    def make(model, kind, lrs, **options):
        key = (model, kind)
        if key not in made:
            net, adapters = plain(model, SETTINGS[kind], **options)
            with torch.no_grad():
                before = net(IDS).logits
            history = oracle(net, lrs)
            with torch.no_grad():
                made[key] = before, history, net(IDS).logits, adapters
        return made[key]

    return make


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("kind", SETTINGS)
def test_training_follows_plain_torch(kind, name, ranks, model, expected):
    world, parallel, options = MESHES[name]
    found = ranks.run(adapters_work.train_adapters, world, str(model), parallel, STEPS, SETTINGS[kind], IDS, **options)
    history = np.array(found[0]["history"])
    before, wanted, after, adapters = expected(model, kind, history[:, 2].tolist())
    assert any(norm > CLIP for norm in wanted[:, 1]), "clipping must be active"
    assert np.abs(history[:, 0] - wanted[:, 0]).max() < 1e-5
    assert np.allclose(history[:, 1], wanted[:, 1], rtol=1e-4)
    logits, live, merged = first(found, "logits")
    assert (logits - before).abs().max() < 2e-4
    assert (live - merged).abs().max() < 2e-5
    assert (live - after).abs().max() < 2e-4 and (live - before).abs().max() > 0.05
    _same_adapters(found[0]["tensors"], adapters)
    for rank in found:
        assert all(".lora_" in n for n in rank["trains"]) and not any("lora_" in n for n in rank["state"])


def _same_adapters(tensors, adapters):
    for name, adapter in adapters.items():
        start = f"base_model.model.{name}."
        parts = {"lora_A.weight": adapter.a, "lora_B.weight": adapter.b, "lora_magnitude_vector": adapter.m}
        for part, wanted in parts.items():
            if wanted is not None:
                assert (tensors.pop(start + part) - wanted.detach()).abs().max() < 1e-4, start + part
    assert not tensors
