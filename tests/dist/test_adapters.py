"""LoRA and DoRA on meshes: against plain torch, as a merged export and as a PEFT directory, beside a shield, resumed."""

from __future__ import annotations

import json
import math
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ssu.adapters.freeze import adapter_shield
from megatron_ssu.adapters.matrix import draw
from megatron_ssu.adapters.settings import AdapterSettings
from megatron_ssu.models.families import family_of
from megatron_ssu.models.family import Dims
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.shield.shield_file import load_shield
from megatron_ssu.shield.verify import verify
from tests.dist import adapters_work, work
from tests.dist.adapters_work import CLIP, DECAY, LR
from tests.dist.ranks import RankError
from tests.dist.test_shielded_training import OVERLAP, random_shield
from tests.dist.work import mesh
from tests.models import make_model
from tests.unit.data_makers import make_hf_tokenizer, write_jsonl

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


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_before_the_first_step_a_bf16_model_is_the_base_to_the_bit(kind, ranks, tmp_path):
    model = make_model("olmo2", tmp_path / "model", torch.bfloat16)
    parallel = mesh(2, sequence=True)
    base = next(x for x in ranks.run(work.logits, 2, str(model), parallel, IDS, "bf16") if x is not None)
    found = ranks.run(adapters_work.train_adapters, 2, str(model), parallel, 0, SETTINGS[kind], IDS, dtype="bf16")
    assert torch.equal(first(found, "logits")[0], base)


def _same_adapters(tensors, adapters):
    for name, adapter in adapters.items():
        start = f"base_model.model.{name}."
        parts = {"lora_A.weight": adapter.a, "lora_B.weight": adapter.b, "lora_magnitude_vector": adapter.m}
        for part, wanted in parts.items():
            if wanted is not None:
                assert (tensors.pop(start + part) - wanted.detach()).abs().max() < 1e-4, start + part
    assert not tensors


def _train_and_export(ranks, model, target, settings, world=2, parallel=None, **options):
    parallel = mesh(2, sequence=True) if parallel is None else parallel
    return ranks.run(
        adapters_work.train_adapters, world, str(model), parallel, STEPS, settings, IDS, target=str(target), **options
    )


def _transformers_logits(directory):
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return net(IDS).logits


EXPORTS = {
    "lora": ("llama", SETTINGS["lora"], False),
    "dora": ("olmo2", SETTINGS["dora"], False),
    "some, embeddings": ("llama", SETTINGS["some"], True),
    "dora, tied embeddings": ("llama-tied", SETTINGS["dora"], True),
}


@pytest.fixture(scope="module")
def exports(ranks, tmp_path_factory):
    """By name: the source, the export, logits of the live model."""
    made = {}

    def make(name):
        if name not in made:
            kind, settings, embeddings = EXPORTS[name]
            folder = tmp_path_factory.mktemp("export")
            model = make_model(kind, folder / "model")
            found = _train_and_export(ranks, model, folder / "target", settings, embeddings=embeddings)
            made[name] = model, folder / "target", first(found, "logits")[1]
        return made[name]

    return make


@pytest.mark.parametrize("name", EXPORTS)
def test_merged_export_computes_what_the_live_model_did(name, exports):
    source, target, live = exports(name)
    found = _transformers_logits(target)
    assert (found - live).abs().max() < 1e-4 and (found - _transformers_logits(source)).abs().max() > 0.05


@pytest.mark.parametrize("name", EXPORTS)
def test_peft_directory_holds_what_was_merged(name, exports):
    source, target, _ = exports(name)
    config = json.loads((target / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(target / "adapter" / "adapter_model.safetensors")
    base, merged = (load_file(path / "model.safetensors") for path in (source, target))
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    for matrix, weight in base.items():
        start = "base_model.model." + matrix.removesuffix(".weight")
        if f"{start}.lora_A.weight" in tensors:
            a, b = tensors.pop(f"{start}.lora_A.weight"), tensors.pop(f"{start}.lora_B.weight")
            assert matrix.split(".")[-2] in config["target_modules"] and a.shape == (config["r"], weight.shape[1])
            wanted = weight + scale * b @ a
            if config["use_dora"]:
                wanted *= (tensors.pop(f"{start}.lora_magnitude_vector") / wanted.norm(dim=1))[:, None]
            assert (merged[matrix] - wanted).abs().max() < 1e-6
        elif f"{start}.weight" in tensors:
            assert start.rpartition(".")[2] in config["modules_to_save"]
            assert torch.equal(tensors.pop(f"{start}.weight"), merged[matrix]) and not torch.equal(
                merged[matrix], weight
            )
        else:
            assert torch.equal(merged[matrix], weight)
    head = tensors.pop("base_model.model.lm_head.weight", None)
    assert not tensors and (head is None or torch.equal(head, merged["model.embed_tokens.weight"]))


@pytest.mark.parametrize("name", EXPORTS)
def test_peft_loads_its_directory(name, exports):
    peft = pytest.importorskip("peft", reason="peft is not installed; it comes with the extra `test`")
    import transformers

    source, target, live = exports(name)
    net = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        adapted = peft.PeftModel.from_pretrained(net, target / "adapter")
    with torch.no_grad():
        found = adapted.eval()(IDS).logits
    assert (found - _transformers_logits(target)).abs().max() < 1e-5
    assert (found - live).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("granularity", ["column", "row"])
def test_merging_beside_a_shield_moves_no_frozen_bit(granularity, dtype, ranks, tmp_path):
    model = make_model("olmo2", tmp_path / "model", {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    file = random_shield(model, tmp_path / "shield.safetensors", granularity)
    _put_negative_zeros(model)
    shield = load_shield(file)
    shield.fingerprint = model_fingerprint(model)
    shield.save(file, overwrite=True)
    target = tmp_path / "target"
    found = _train_and_export(
        ranks, model, target, SETTINGS["lora"], world=4, parallel=mesh(2, 2), shield_file=str(file), dtype=dtype
    )
    tensors = found[0]["tensors"]
    for name, matrix in shield.matrices.items():
        if matrix.scored:
            frozen = torch.from_numpy(shield.masks[name].bits())
            part, dim = ("lora_A", 1) if granularity == "column" else ("lora_B", 0)
            values = tensors[f"base_model.model.{name.removesuffix('.weight')}.{part}.weight"]
            assert not values.index_select(dim, frozen.nonzero().view(-1)).any()
            assert values.index_select(dim, (~frozen).nonzero().view(-1)).any()
    assert verify(model, target, file).ok
    matrices = list(family_of(json.loads((model / "config.json").read_text())).matrices(_dims(model)))
    own = adapter_shield(
        matrices, SETTINGS["lora"], model="m", fingerprint=model_fingerprint(model), base=load_shield(file)
    )
    own.save(tmp_path / "own.safetensors")
    report = verify(model, target, tmp_path / "own.safetensors")
    totals = report.totals(granularity)
    assert report.ok and totals["frozen"] > 0 and totals["moved_trainable"] > 0.99 * totals["trainable"] > 0


def _dims(model):
    return Dims.from_hf(json.loads((model / "config.json").read_text()))


def _put_negative_zeros(model):
    """To which adding zero would change a bit."""
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if "_proj" in name:
            tensor.view(-1)[::7] = -0.0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_training_beside_a_shield_follows_plain_torch(ranks, model, tmp_path):
    file = random_shield(model, tmp_path / "shield.safetensors")
    net, adapters = plain(model, SETTINGS["lora"], shield_file=file)
    wanted = None
    for world, parallel in ((1, mesh()), (2, mesh(2, sequence=True))):
        arguments = (str(model), parallel, STEPS, SETTINGS["lora"], IDS)
        found = ranks.run(adapters_work.train_adapters, world, *arguments, shield_file=str(file))
        history = np.array(found[0]["history"])
        wanted = oracle(net, history[:, 2].tolist()) if wanted is None else wanted
        assert np.abs(history[:, 0] - wanted[:, 0]).max() < 1e-5
        _same_adapters(found[0]["tensors"], adapters)


def test_the_optimizer_holds_adapters_alone(ranks, model):
    settings = SETTINGS["dora"]
    dims = _dims(model)
    matrices = [m for m in family_of(json.loads((model / "config.json").read_text())).matrices(dims) if m.scored]
    elements = sum(settings.rank * sum(m.shape) + m.shape[0] for m in matrices)
    found = ranks.run(adapters_work.train_adapters, 2, str(model), mesh(), 1, settings, IDS)
    assert sum(rank["owned"] for rank in found) == elements


SAVED_ON = {"lora": (2, mesh(2, sequence=True)), "dora": (4, mesh(2))}  # DoRA's over two data-parallel ranks


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", SAVED_ON)
def test_adapters_resume_to_the_bit_and_on_other_meshes(kind, dtype, ranks, tmp_path):
    model = make_model("olmo2", tmp_path / "model", {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    (world, parallel), settings, folder = SAVED_ON[kind], SETTINGS[kind], str(tmp_path / "run")
    common = (settings, folder)

    def run(world, parallel, span, **options):
        arguments = (str(model), parallel, *common, span, 6)
        return ranks.run(adapters_work.resume, world, *arguments, dtype=dtype, **options)

    whole = run(world, parallel, (0, 6), save_at=3)
    for a, b in zip(whole, run(world, parallel, (3, 6)), strict=True):
        assert a["history"][3:] == b["history"]
        for key in ("adapters", "states"):
            assert len(a[key]) == len(b[key]) > 0 and all(map(torch.equal, a[key], b[key]))
    for world, parallel in ((1, mesh()), (2, mesh(1, 2, 2))):
        (other, *_) = run(world, parallel, (3, 6))
        assert np.allclose(other["history"], whole[0]["history"][3:], atol=1e-5 if dtype == "fp32" else 0.02)
        if dtype == "fp32":
            for name, tensor in whole[0]["tensors"].items():
                assert (other["tensors"][name] - tensor).abs().max() < 1e-5


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A run file of few steps, whose model has a tokenizer, in bf16."""
    folder = tmp_path_factory.mktemp("job")
    model = make_model("llama", folder / "model", torch.bfloat16, vocab_size=321)
    make_hf_tokenizer(model)
    write_jsonl(folder / "text.jsonl", ["Some words that are said again and again. " * 20] * 30)
    (folder / "run.yaml").write_text(f"""
model: {{path: {model}}}
parallel: {{tensor_model_parallel_size: 2}}
method: {{name: lora, lora: {{rank: 4, alpha: 16}}}}
shield: {{score: magnitude}}
data: {{train: {folder}/text.jsonl, split: "90,10,0", sequence_length: 16, loader_workers: 0}}
train: {{iterations: 4, micro_batch_size: 2, global_batch_size: 4, eval_interval: 0, optimizer: {{lr: 0.01}}}}
checkpoint: {{directory: {folder}/run, interval: 2, export: {folder}/adapted}}
""")
    return folder


JOBS = {
    "lora": ([], ("shield",)),
    "dora": (["method.lora.dora=true", "method.lora.embeddings=true"], ("shield",)),
    "shielded": (["method.lora.shielded=true", "method.lora.embeddings=true"], ("shield", "lora-shield")),
}


@pytest.mark.parametrize("name", JOBS)
def test_a_run_trains_resumes_exports_and_verifies(name, job, ranks):
    options, shields = JOBS[name]
    run, adapted, again = job / name, job / f"{name}-hf", job / f"{name}-again"
    common = [*options, f"checkpoint.directory={run}", f"checkpoint.export={adapted}"]
    arguments = (str(job / "run.yaml"), common)
    ranks.run(adapters_work.job, 2, *arguments)
    for file in shields:
        report = verify(job / "model", adapted, run / f"{file}.safetensors")
        assert report.ok and sum(matrix.frozen for matrix in report.matrices) > 0
    before, after = (load_file(path / "model.safetensors") for path in (job / "model", adapted))
    assert all((before[key] != after[key]).any() for key in before if "_proj" in key)
    one = [*common, "parallel.tensor_model_parallel_size=1"]
    ranks.run(adapters_work.job, 1, arguments[0], one, output=str(again))
    for file in ("model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        # DoRA's norms are sums over ranks.
        same = (again / file).read_bytes() == (adapted / file).read_bytes()
        assert same or (name == "dora" and file == "model.safetensors")
    assert "nothing to do" in ranks.run(adapters_work.job, 2, *arguments)[0]
    with pytest.raises(RankError, match=r"method\.lora\.alpha|another shield") as refused:
        ranks.run(adapters_work.job, 2, arguments[0], [*common, "method.lora.alpha=8"])
    assert refused.value.kind == "UserError" and refused.value.agreed
    (run / "checkpoints" / "latest").write_text("2\n")
    shutil.move(adapted, job / f"{name}-first")
    ranks.run(adapters_work.job, 2, *arguments)
    first = (job / f"{name}-first" / "model.safetensors").read_bytes()
    assert (adapted / "model.safetensors").read_bytes() == first, "a resumed run ends with the same bits"
