"""The library: what importing it costs, its functions without a mesh, and the CPU backend on and off."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import megatron_ssu as ssu
from megatron_ssu.compact.parameters import CompactParameters
from megatron_ssu.models.families.llama import LLAMA
from megatron_ssu.models.family import Dims
from megatron_ssu.models.layout import Layout
from megatron_ssu.models.matrix import Matrix
from megatron_ssu.shield.mask import Mask
from megatron_ssu.shield.plan import PlanOptions, plan_shield
from tests.models import SIZES, make_model
from tests.unit.data_makers import make_instruct_tokenizer
from tests.unit.samples import matrices, scores_of, weights_of

ROOT = Path(__file__).resolve().parents[2]
DIMS = Dims(layers=2, hidden=32, heads=4, groups=2, head=8, ffn=48, vocab=64, positions=128, tied=False)


def python(code: str, folder: Path, **variables: str) -> str:
    """Run `code` in a process of its own in `folder`; what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama with a tokenizer, and chats beside it."""
    folder = tmp_path_factory.mktemp("library")
    make_model("llama", folder / "models" / "source", vocab_size=384, num_hidden_layers=2)
    make_instruct_tokenizer(folder / "models" / "source", "llama-3")
    chat = {"messages": [{"role": "user", "content": "What stays?"}, {"role": "assistant", "content": "What matters."}]}
    (folder / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 12)
    return folder / "models" / "source"


@pytest.fixture(scope="module")
def scores():
    members = matrices()
    return scores_of(members, weights_of(members))


def adapted_of(model, target, column_of):
    """A copy of a model in which one column of each matrix of `column_of` (name -> column) is another."""
    weights = load_file(model / "model.safetensors")
    for name, column in column_of.items():
        weights[name][:, column] += 1
    target.mkdir()
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    for file in model.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    return target


MY_TRAINING = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from megatron.core import parallel_state, tensor_parallel
from examples.library import stock_loop

def start():
    stock_loop.start_processes()
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)

def build_model(model_dir):
    hf = json.load(open(f"{{model_dir}}/config.json"))
    return stock_loop.build(hf | {{"rope_theta": 10000.0}}, 1)[1]

def batches():
    return stock_loop.random_tokens(0)

forward_step = stock_loop.forward_step
LENGTH, MICRO_BATCH = stock_loop.LENGTH, stock_loop.MICRO_BATCH
"""

IMPORTED = """
import sys
import megatron_ssu as ssu
assert set(ssu.__all__) <= set(dir(ssu)) and ssu.__version__
loaded = [name for name in ("torch", "numpy", "megatron.core", "transformers", "safetensors") if name in sys.modules]
assert not loaded, loaded
assert ssu.UserError.__module__ == "megatron_ssu.errors" and callable(ssu.plan) and callable(ssu.apply)
assert "torch" not in sys.modules
"""

FILES = """
import sys
import megatron_ssu as ssu
shield = ssu.plan(ssu.Scores.load("scores"), 0.25, special_tokens=False)
shield.save("shield")
found = ssu.inspect("shield", "scores", ssu.load_shield("shield")).to_dict()
assert found["realised"]["linear"]["ratio"] <= 0.25
report = ssu.verify("model", "model", shield)
assert report.status == 0 and isinstance(report, ssu.VerifyReport)
loaded = [name for name in ("torch", "megatron.core") if name in sys.modules]
assert not loaded, loaded
import torch
from megatron_ssu.engine import cpu_backend
assert not cpu_backend.is_installed() and torch.zeros is torch._C._VariableFunctions.zeros
"""


@pytest.mark.process
def test_the_snippets_of_the_docs_run(model, tmp_path):
    """In the order of the page, in one process, beside the module that they import the caller's own code from."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
    assert len(blocks) >= 6
    shutil.copytree(model.parents[1], tmp_path, dirs_exist_ok=True)
    (tmp_path / "my_training.py").write_text(MY_TRAINING)
    assert "0 frozen columns moved" in python("\n".join(blocks), tmp_path)


@pytest.mark.process
def test_importing_loads_nothing(tmp_path):
    python(IMPORTED, tmp_path)


@pytest.mark.process
def test_files_need_no_torch_and_install_nothing(tmp_path, scores):
    make_model("llama", tmp_path / "model", num_hidden_layers=1)
    made = ssu.score(tmp_path / "model", scores=["magnitude"])
    made.save(tmp_path / "scores")
    python(FILES, tmp_path)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        ssu.fit  # noqa: B018
    assert all(getattr(ssu, name) is not None for name in ssu.__all__)


BACKEND = """
import torch
from megatron_ssu.engine import cpu_backend
from megatron_ssu.engine.private_names import owner_of

def held():
    places = [owner_of(path) for path in cpu_backend.replaced_names()]
    return [(name in vars(owner), vars(owner).get(name)) for owner, name in places]

names, before = cpu_backend.replaced_names(), held()
assert cpu_backend.install_cpu_backend() and not cpu_backend.install_cpu_backend()
during = held()
assert all(was[1] is not now[1] for was, now in zip(before, during, strict=True))
assert torch.zeros(1).cuda().is_cpu
assert all(cpu_backend.stock(p) is not None for p in names)
cpu_backend.uninstall_cpu_backend()
cpu_backend.uninstall_cpu_backend()
assert len(before) == len(names) > 20

def same():
    return all(was[0] is now[0] and was[1] is now[1] for was, now in zip(before, held(), strict=True))

assert same() and not cpu_backend.is_installed()
assert torch.zeros(1).type() == "torch.FloatTensor"
with cpu_backend.cpu_backend():
    assert torch.zeros(1, device="cuda").is_cpu and torch.zeros(1).type() == "torch.cuda.FloatTensor"
    with cpu_backend.cpu_backend():
        pass
    assert cpu_backend.is_installed(), "an inner one leaves the outer one's"
try:
    with cpu_backend.cpu_backend():
        raise KeyError
except KeyError:
    pass
assert same()
try:
    torch.zeros(1).cuda()
except (RuntimeError, AssertionError):
    print("stock")
"""


@pytest.mark.process
def test_the_cpu_backend_can_be_taken_off(tmp_path):
    assert python(BACKEND, tmp_path, CUDA_VISIBLE_DEVICES="") == "stock\n"


def test_plan_is_the_planner(scores):
    for options in ({}, {"granularity": "row", "ratio": 0.3}, {"score": "fisher", "budget": "layerwise", "floor": 0.2}):
        shield = ssu.plan(scores, special_tokens=False, **options)
        assert shield.digest() == plan_shield(scores, PlanOptions(**options), method="ssu").digest()
    shield = ssu.plan(scores, special_tokens=False, protect=[("layers:0", "trainable")])
    assert not any(shield.counts[name] for name in shield.matrices if ".layers.0." in name)


def test_plan_says_what_it_lacks(scores, model):
    with pytest.raises(ssu.UserError, match="special_tokens needs model_dir"):
        ssu.plan(scores)
    with pytest.raises(ssu.UserError, match="scores of model tiny, not of source in model_dir"):
        ssu.plan(scores, model_dir=model)
    with pytest.raises(ssu.UserError, match=r"shield.ratio: .* got 1\.5"):
        ssu.plan(scores, 1.5, special_tokens=False)
    scores = ssu.score(model, scores=["magnitude", "random"])
    assert ssu.plan(scores, special_tokens=False).score == "magnitude", "the only one"


def test_scores_in_one_process_and_leaves_nothing_behind(model):
    from megatron_ssu.engine.cpu_backend import is_installed

    before, state = is_installed(), torch.get_rng_state()
    scores = ssu.score(model, calibration=model.parents[1] / "chats.jsonl", scores=["wanda", "magnitude"], samples=8)
    assert before == is_installed() and not torch.distributed.is_initialized()
    assert torch.equal(state, torch.get_rng_state())
    weights = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_allclose(scores.column("magnitude", name), weights[name].double().abs().sum(0), rtol=1e-12)
    expected = scores.column("magnitude", name) * scores.column("input_norm", name)
    np.testing.assert_allclose(scores.column("wanda", name), expected, rtol=1e-12)

    shield = ssu.plan(scores, model_dir=model)
    rows = np.flatnonzero(shield.masks["lm_head.weight"].rows())
    assert rows.size and (rows == np.flatnonzero(shield.masks["model.embed_tokens.weight"].rows())).all()
    element = ssu.plan(scores, granularity="element", norms="frozen", model_dir=model)
    assert element.masks[name].granularity == "element" and element.counts["model.norm.weight"] == SIZES["hidden_size"]


def test_score_refuses_in_a_line(model):
    for options, told in (
        ({"scores": ["wonder"]}, "scores: 'wonder' is unknown"),
        ({"scores": []}, "must name at least one"),
        ({}, "calibration: must be given for the score wanda"),
        ({"scores": "change"}, "change_from: must be given"),
        ({"calibration": "none.jsonl"}, "none.jsonl"),
        ({"scores": "magnitude", "dtype": "bf16"}, "would be rounded to bf16"),
    ):
        with pytest.raises(ssu.UserError, match=told) as error:
            ssu.score(model, **options)
        assert "\n" not in str(error.value)
    assert not torch.distributed.is_initialized()


def test_verify_and_inspect_take_files_and_objects(model, tmp_path):
    scores = ssu.score(model, scores=["magnitude"])
    shield = ssu.plan(scores, special_tokens=False)
    shield.save(tmp_path / "shield")
    scores.save(tmp_path / "scores")
    name = "model.layers.0.self_attn.q_proj.weight"
    frozen = int(np.flatnonzero(shield.masks[name].columns())[0])
    adapted = adapted_of(model, tmp_path / "adapted", {name: frozen})
    for given in (shield, tmp_path / "shield", ssu.load_shield(tmp_path / "shield")):
        report = ssu.verify(model, adapted, given)
        assert not report.ok and [m.name for m in report.matrices if m.moved_frozen] == [name]
        found = ssu.inspect(given, tmp_path / "scores", shield)
        assert found.to_dict() == ssu.inspect(shield, scores, tmp_path / "shield").to_dict()
    text = io.StringIO()
    found.render(Console(file=text, width=160))
    assert "q_proj" in text.getvalue()


class Fused(torch.nn.Module):
    """A linear layer with its norm in it, as Transformer Engine has them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(inputs))
        self.weight = torch.nn.Parameter(torch.ones(outputs, inputs))


def tree(names: dict[str, torch.nn.Module]) -> torch.nn.Module:
    """Modules nested as their dotted names say."""
    root = torch.nn.Module()
    for name, module in names.items():
        *path, last = name.split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, module)
    return root


def engine_layer(number: int) -> torch.nn.Module:
    layer: torch.nn.Module = tree(
        {
            "self_attention.linear_qkv": Fused(DIMS.hidden, 64),
            "self_attention.linear_proj": torch.nn.Linear(32, DIMS.hidden, bias=False),
            "mlp.linear_fc1": Fused(DIMS.hidden, 2 * DIMS.ffn),
            "mlp.linear_fc2": torch.nn.Linear(DIMS.ffn, DIMS.hidden, bias=False),
        }
    )
    layer.layer_number = number  # type: ignore[assignment]
    return layer


def engine_chunk() -> torch.nn.Module:
    """The parameters of a Llama of Transformer Engine's stock layers, the second half of it."""
    chunk = tree({"decoder.final_layernorm": torch.nn.RMSNorm(DIMS.hidden)})
    chunk.decoder.layers = torch.nn.ModuleList([engine_layer(2)])
    chunk.output_layer = torch.nn.Linear(DIMS.hidden, DIMS.vocab, bias=False)
    chunk.share_embeddings_and_output_weights, chunk.pre_process, chunk.post_process = False, False, True
    return chunk


def wrapped(module: torch.nn.Module) -> torch.nn.Module:
    """As Float16Module and DDP wrap."""
    wrapper = torch.nn.Module()
    wrapper.module = module
    return wrapper


@pytest.mark.parametrize("wrap", [lambda c: c, wrapped, lambda c: wrapped(wrapped(c))], ids=["bare", "one", "two"])
def test_the_layout_finds_fused_norms_and_wrapped_chunks(wrap):
    layout = Layout(LLAMA, DIMS, [wrap(engine_chunk())], 0, 1, DIMS.vocab)
    found = {local.name: [matrix.name for matrix in local.matrices] for local in layout}
    layer = "decoder.layers.0."
    assert found[layer + "self_attention.linear_qkv.layer_norm_weight"] == ["model.layers.1.input_layernorm.weight"]
    assert found[layer + "mlp.linear_fc1.layer_norm_weight"] == ["model.layers.1.post_attention_layernorm.weight"]
    assert found[layer + "mlp.linear_fc1.weight"] == [
        f"model.layers.1.mlp.{kind}_proj.weight" for kind in ("gate", "up")
    ]
    assert found["output_layer.weight"] == ["lm_head.weight"] and len(found) == 8


def test_a_parameter_that_the_family_does_not_know_is_refused():
    chunk = engine_chunk()
    chunk.decoder.layers[0].mlp.router = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(
        ssu.UserError, match=r"parameter decoder\.layers\.0\.mlp\.router\.weight must be one that a llama"
    ):
        Layout(LLAMA, DIMS, [chunk], 0, 1, DIMS.vocab)


def test_a_layer_with_its_norm_in_it_may_have_two_pinned_weights():
    chunk = engine_chunk()
    layout = Layout(LLAMA, DIMS, [chunk], 0, 1, DIMS.vocab)
    gate = Matrix("model.layers.1.mlp.gate_proj.weight", (48, 32), 1, "gate_proj")
    norm = Matrix("model.layers.1.post_attention_layernorm.weight", (32,), 1, "norm")
    masks = {
        gate.name: Mask.of("column", gate.shape, np.arange(32) < 2),
        norm.name: Mask.of("element", norm.shape, np.arange(32) < 16),
    }
    shield = ssu.Shield("ssu", "m", "f", matrices={gate.name: gate, norm.name: norm}, masks=masks)
    compact = CompactParameters([chunk], layout, shield, gemm=None)
    layer = chunk.decoder.layers[0].mlp.linear_fc1
    assert len(compact.pinned) == 2
    with torch.no_grad():
        layer.weight.zero_()
        layer.layer_norm_weight.zero_()
    compact.updated(gathered=True)
    assert layer.layer_norm_weight.tolist() == [1.0] * 16 + [0.0] * 16
    assert layer.weight[:48, :2].eq(1).all() and layer.weight[:, 2:].eq(0).all() and layer.weight[48:].eq(0).all()
