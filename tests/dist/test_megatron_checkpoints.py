"""Checkpoints for Megatron-LM and from it: read and written by megatron-core's own loader, with its stock layers."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.dist import megatron_work
from tests.dist.test_tools import ROOT, tool
from tests.models import make_model

VOCAB = 128  # padded: as ours is, and as Megatron-LM would with another divisor
OTHER_VOCAB = 112
EXPERTS = {
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none",
    "moe_router_dtype": "fp32",
    "moe_token_dispatcher_type": "allgather",
    "expert_tensor_parallel_size": 1,
}
KINDS = {
    "llama": {},
    "llama-tied": {},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True, "kv_channels": 16},
    "mixtral": EXPERTS | {"num_moe_experts": 4, "moe_ffn_hidden_size": 96},
    "qwen3-moe": EXPERTS | {"num_moe_experts": 8, "moe_ffn_hidden_size": 40, "qk_layernorm": True, "kv_channels": 16},
}
PLACES = {"TP1": (1, 1), "TP2xPP2": (2, 2)}


def make(kind, folder):
    """A small model without what Megatron-LM's own GPTModel lacks."""
    return make_model(kind, folder, tie_word_embeddings=kind == "llama-tied")


def convert(loader, given, saver, made, *options):
    """tools/checkpoint/convert.py"""
    places = ("--loader", loader, "--load-dir", given, "--saver", saver, "--save-dir", made)
    return tool("checkpoint/convert.py", *places, *options)


def logits_of(model, ids):
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return net(ids).logits


@pytest.mark.parametrize("kind", ["qwen2", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "qwen2")])
def test_megatron_lm_loads_what_was_converted(kind, ranks, tmp_path):
    model, target = make(kind, tmp_path / "model"), tmp_path / "megatron"
    done = convert("hf", model, "megatron", target, "--dtype", "fp32")
    assert done.returncode == 0, done.stderr
    assert (target / "latest_checkpointed_iteration.txt").read_text() == "release"
    ids = torch.randint(0, 100, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = logits_of(model, ids)
    for world, place in ((1, "TP1"), (4, "TP2xPP2")):
        changes = {**KINDS[kind], "transformer_engine_keys": "num_moe_experts" in KINDS[kind]}
        answers = ranks.run(megatron_work.load, world, str(target), str(model), PLACES[place], ids, VOCAB, changes)
        found, arguments, iteration = next(answer for answer in answers if answer[0] is not None)
        assert (found[..., :100] - expected).abs().max() < 2e-4
        assert iteration == 0
        assert arguments["num_query_groups"] == 4 and arguments["padded_vocab_size"] == VOCAB
        assert arguments["add_qkv_bias"] == (kind == "qwen2") and arguments["swiglu"] is True


@pytest.mark.parametrize(
    "kind", ["qwen3", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k not in ("qwen2", "qwen3"))]
)
def test_what_megatron_lm_wrote_becomes_a_hugging_face_directory_bit_by_bit(kind, ranks, tmp_path):
    model, theirs, back = make(kind, tmp_path / "model"), tmp_path / "theirs", tmp_path / "back"
    ranks.run(megatron_work.save, 4, str(theirs), str(model), PLACES["TP2xPP2"], OTHER_VOCAB, KINDS[kind])
    described = tmp_path / "described"
    described.mkdir()
    shutil.copy(model / "config.json", described)
    done = convert("megatron", theirs, "hf", back, "--hf-dir", described, "--dtype", "fp32")
    assert done.returncode == 0, done.stderr
    before, after = load_file(model / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.fixture(scope="module")
def theirs(ranks, tmp_path_factory):
    """A Megatron checkpoint and the Hugging Face directory that it was made of."""
    folder = tmp_path_factory.mktemp("theirs")
    model = make("llama", folder / "model")
    ranks.run(megatron_work.save, 4, str(folder / "megatron"), str(model), PLACES["TP2xPP2"], OTHER_VOCAB, {})
    return folder


def run(folder, command, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "megatron_ssu", command, folder / "run.yaml", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def write_run(folder, theirs, **model):
    settings = {
        "model": {"path": str(theirs / "megatron"), "hf_path": str(theirs / "model"), **model},
        "precision": {"dtype": "fp32"},
        "shield": {"score": "magnitude", "special_tokens": False},
        "checkpoint": {"directory": str(folder / "run")},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))


def test_a_megatron_checkpoint_is_a_run_s_model(theirs, tmp_path):
    write_run(tmp_path, theirs)
    done = run(tmp_path, "score")
    assert done.returncode == 0, done.stderr
    source = tmp_path / "run" / "source"
    before, after = load_file(theirs / "model" / "model.safetensors"), load_file(source / "model.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before)
    stamp = (source / "model.safetensors").stat().st_mtime_ns
    done = run(tmp_path, "plan")
    assert done.returncode == 0, done.stderr
    assert (source / "model.safetensors").stat().st_mtime_ns == stamp
    done = run(tmp_path, "estimate", "data.sequence_length=32")
    assert done.returncode == 0, done.stderr
    done = run(tmp_path, "plan", "precision.dtype=bf16")
    assert done.returncode == 2 and "was made of another checkpoint" in done.stderr


def test_what_cannot_be_read_is_refused_in_one_line(theirs, tmp_path):
    write_run(tmp_path, theirs, hf_path=None)
    cases = [([], ["is a Megatron checkpoint", "model.hf_path"])]
    given = f"model.hf_path={theirs / 'model'}"
    cases.append(
        ([given, f"model.path={theirs / 'model'}"], ["model.path", "torch_dist", "latest_checkpointed_iteration.txt"])
    )
    cases.append(([given, "precision.dtype=bf16"], ["float32", "precision.dtype", "bfloat16"]))
    other = tmp_path / "other"
    shutil.copytree(theirs / "model", other)
    for changes, words in (
        ({"intermediate_size": 112}, ["linear_fc1.weight", "same model"]),
        ({"tie_word_embeddings": False, "num_hidden_layers": 5}, ["[4, ", "[5, "]),
        ({"model_type": "qwen2"}, ["has no tensor", "linear_qkv.bias"]),
    ):
        folder = tmp_path / next(iter(changes))
        shutil.copytree(other, folder)
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        cases.append(([f"model.hf_path={folder}"], words))
    evil = tmp_path / "evil"
    shutil.copytree(theirs / "megatron", evil)
    (evil / "iter_0000007" / ".metadata").write_bytes(pickle.dumps(subprocess.Popen))
    cases.append(([given, f"model.path={evil}"], [".metadata", "subprocess.Popen"]))
    for overrides, words in cases:
        done = run(tmp_path, "score", *overrides)
        assert done.returncode == 2, (overrides, done.stderr)
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert all(word in done.stderr for word in words), done.stderr
        assert not (tmp_path / "run" / "source").exists()


def test_a_run_s_checkpoint_goes_to_megatron_lm(ranks, tmp_path):
    """The core side may be a run directory, whose iteration goes with the weights."""
    model, core, target = make("llama", tmp_path / "model"), tmp_path / "core", tmp_path / "megatron"
    done = convert("hf", model, "core", core, "--dtype", "fp32")
    assert done.returncode == 0, done.stderr
    done = convert("core", core, "megatron", target)
    assert done.returncode == 0, done.stderr
    ids = torch.randint(0, 100, (2, 40), generator=torch.Generator().manual_seed(1))
    found, _, _ = ranks.run(megatron_work.load, 1, str(target), str(model), PLACES["TP1"], ids, VOCAB, {})[0]
    assert (found[..., :100] - logits_of(model, ids)).abs().max() < 2e-4
    again = convert("core", core, "megatron", target)
    assert again.returncode == 2 and "not overwritten" in again.stderr
