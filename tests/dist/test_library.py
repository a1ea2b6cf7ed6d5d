"""The library on megatron-core's stock parts: the trainer's own trajectory, and no frozen bit that moves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import megatron_ssu as ssu
from megatron_ssu.models.families import family_of
from megatron_ssu.models.family import Dims
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.shield.mask import Mask
from megatron_ssu.shield.shield_file import Shield
from megatron_ssu.shield.verify import verify
from tests.dist import library_work, work
from tests.dist.test_shielded_training import OVERLAP
from tests.dist.work import mesh
from tests.models import make_model
from tests.unit.data_makers import make_instruct_tokenizer

STEPS = 8
ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "TP1": (1, {}, {}),
    "TP2": (2, {"tensor": 2}, {}),
    "DP2": (2, {}, {"evaluations": True}),
    "DP2, attached": (2, {}, {"attach": True, "evaluations": True}),
    "DP2, overlap": (2, {}, {"ddp": {**OVERLAP, "bucket_size": 20000}, "evaluations": True}),
    "DP2, overlap, attached": (2, {}, {"ddp": OVERLAP, "attach": True}),
    "PP2xVPP2": (2, {"pipeline": 2, "virtual": 2}, {}),
    "TP1, bf16": (1, {}, {"dtype": "bf16"}),
}


def shield_of(model, path, granularity):
    """Half of all linear weights, five rows of embedding and head (pinned, as special tokens are), half of every norm."""
    hf = json.loads((model / "config.json").read_text())
    draw = np.random.default_rng(1)
    matrices, masks = {}, {}
    for matrix in family_of(hf).matrices(Dims.from_hf(hf)):
        kind, share = granularity, 0.5
        if not matrix.scored:
            kind, share = ("row", 0.05) if len(matrix.shape) == 2 else ("element", 0.5)
        units = matrix.elements if kind == "element" else matrix.shape[-1 if kind == "column" else 0]
        frozen = draw.permutation(units) < share * units
        matrices[matrix.name], masks[matrix.name] = matrix, Mask.of(kind, matrix.shape, frozen)
    Shield("ssu", model.name, model_fingerprint(model), matrices=matrices, masks=masks).save(path)
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("model") / "model")


@pytest.mark.parametrize(
    "granularity,case",
    [
        *(("column", case) for case in CASES if case != "DP2, overlap, attached"),
        *(
            pytest.param(*more, marks=pytest.mark.slow)
            for more in (("column", "DP2, overlap, attached"), ("element", "TP2"))
        ),
    ],
)
def test_a_stock_loop_is_the_trainer(granularity, case, ranks, model, tmp_path):
    world, parallel, options = CASES[case]
    dtype = options.get("dtype", "fp32")
    if dtype == "bf16":
        model = make_model("llama", tmp_path / "model", torch.bfloat16)
    shield = shield_of(model, tmp_path / "shield.safetensors", granularity)
    own, stock = str(tmp_path / "own"), str(tmp_path / "stock")
    settings = {"shield_file": shield, "target": own, "fused_adam": False, "dtype": dtype, "ddp": options.get("ddp")}
    ours = ranks.run(work.train_steps, world, str(model), mesh(**parallel), STEPS, **settings)[0]["history"]
    arguments = (str(model), parallel, [lr for *_, lr in ours], shield, stock)
    found = ranks.run(library_work.train, world, *arguments, **options)[0]

    losses, norms = (np.array([(a[i], b[i]) for a, b in zip(found["history"], ours, strict=True)]) for i in (0, 1))
    assert np.abs(losses[:, 0] - losses[:, 1]).max() < (1e-5 if dtype == "fp32" else 2e-2)
    assert np.allclose(norms[:, 0], norms[:, 1], rtol=1e-4 if dtype == "fp32" else 0.1)
    report = verify(model, stock, shield)
    assert report.ok
    assert all(m.moved_trainable for m in report.matrices if m.trainable)
    if dtype == "fp32":
        weights = [load_file(Path(folder) / "model.safetensors") for folder in (own, stock)]
        assert max(float((weights[0][n] - weights[1][n]).abs().max()) for n in weights[0]) < 1e-5
    after = found["watched"]
    if after and "overlap" not in case:
        before, after = after[::2], after[1::2]
        assert before[1:] == after[:-1], "an evaluation after the gradients sees the weights of the last step"
    assert len(set(after)) == len(after), "one after the step sees the new ones"


def test_weights_that_are_loaded_later_stay(ranks, model, tmp_path):
    other = make_model("llama", tmp_path / "other", seed=5)
    shield = shield_of(model, tmp_path / "shield.safetensors", "column")
    ranks.run(library_work.reload, 1, str(model), str(other), shield, str(tmp_path / "target"))
    weights = [load_file(folder / "model.safetensors") for folder in (other, tmp_path / "target")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_bad_input_is_refused_in_a_line(ranks, model, tmp_path):
    other = make_model("llama", tmp_path / "other", intermediate_size=128)
    shield = shield_of(model, tmp_path / "shield.safetensors", "column")
    first, second = ranks.run(library_work.refused, 2, str(model), str(other), shield, 2)
    assert first == second, "on all ranks alike"
    expected = {
        "no mesh": "parallel_state.initialize_model_parallel",
        "no chunks": "an empty list",
        "other module": "must be megatron-core's GPTModel, got Linear",
        "other model": "made for model model and not for other",
        "no config": "got int",
        "bias": "linear_proj.bias must be one that a llama model has",
        "heads": "num_query_groups must be 4 as in config.json, got 8",
        "deferred": "defer_embedding_wgrad_compute: True does not go with a shield",
        "width": "ffn_hidden_size must be 64",
        "family": "model_type 'gpt2' is not supported",
        "shield's shapes": "must be [64, 128] for this model, got [64, 96]",
        "shape": "decoder.layers.0.mlp.linear_fc2.weight must be [64, 48] on this rank",
        "dtype": "must be torch.float32 as config says, got torch.bfloat16",
        "DDP": "DistributedDataParallel: DDP has wrapped this chunk already",
        "in DDP": "GPTModel: DDP has wrapped this chunk already",
        "weights": "load_weights comes before",
        "no finalize": "config.finalize_model_grads_func: must be set",
    }
    assert set(first) == set(expected)
    for case, part in expected.items():
        assert part in first[case] and "\n" not in first[case], (case, first[case])


def test_a_mesh_that_is_there_is_scored_on(ranks, tmp_path):
    model = make_model("llama", tmp_path / "model", vocab_size=384, num_hidden_layers=2)
    make_instruct_tokenizer(model, "llama-3")
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"text": f"Line {i} says what {i * i} is."}) + "\n" for i in range(8)))
    names = ["wanda", "magnitude", "fisher"]
    alone = ssu.score(model, calibration=chats, scores=names, samples=8, sequence_length=32).tensors
    for found in ranks.run(library_work.score, 2, str(model), 2, str(chats), names):
        for tensors in found:
            assert set(tensors) == set(alone)
            for key, values in tensors.items():
                np.testing.assert_allclose(values, alone[key], rtol=1e-3 if "fisher" in key else 1e-5, err_msg=key)


@pytest.mark.process
@pytest.mark.parametrize(
    "world,options",
    [(1, []), (2, ["--tensor", "2"]), pytest.param(2, [], marks=pytest.mark.slow)],
    ids=["one", "TP2", "DP2"],
)
def test_the_example(world, options, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    script = [str(ROOT / "examples/library/stock_loop.py"), "--steps", "2", *options]
    command = [*launch, *script] if world > 1 else [sys.executable, *script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("OK: no frozen bit moved: 0 of 512 frozen columns moved, 512 of 512")
