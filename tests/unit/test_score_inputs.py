"""What scores read beside the model: a second checkpoint, target text; and scores that were made with other ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ssu.config.load import load_run
from megatron_ssu.errors import UserError
from megatron_ssu.methods.planned import write_plan
from megatron_ssu.methods.scored import load_samples, needs_scoring
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.source import open_source
from megatron_ssu.scoring import registry
from megatron_ssu.scoring.base import Score
from megatron_ssu.scoring.change import open_before
from megatron_ssu.scoring.snr import signal_to_noise
from tests.models import make_model
from tests.unit.data_makers import make_hf_tokenizer
from tests.unit.samples import further_scores, scores_of


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A model with a tokenizer, one to compare it with, and texts."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("model", "before")):
        make_model("llama", tmp_path / name, seed=seed, vocab_size=321, num_hidden_layers=2)
    make_hf_tokenizer(tmp_path / "model")
    for name in ("source", "target"):
        lines = [json.dumps({"text": f"{name} text {i}"}) + "\n" for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "run.yaml").write_text(
        "model: {path: model}\ncheckpoint: {directory: run}\nshield:\n"
        "  calibration: {path: source.jsonl, samples: 3}\n  target_calibration: {path: target.jsonl, samples: 3}\n"
        "  change_from: before\n  special_tokens: false\n  also_score: [change]\n"
    )
    (tmp_path / "run").mkdir()
    return tmp_path


def loaded(*overrides: str):
    run = load_run("run.yaml", list(overrides))
    return run, open_source(run.model.path)


def made_scores(run, source):
    """A scores file's content as `score` makes it for the run, with made-up scores."""
    members = {m.name: m for m in source.family.matrices(source.dims)}
    old = load_file("before/model.safetensors")
    weights = load_file("model/model.safetensors")
    scores = scores_of(members, weights)
    further_scores(scores, weights, old)
    samples = load_samples(run, source)
    scores.model, scores.fingerprint = source.name, model_fingerprint(source.path)
    scores.calibration = samples.source.digest if samples.source else "none"
    scores.settings["change_from"] = {"model": "before", "fingerprint": samples.before.fingerprint}
    if samples.target is not None:
        scores.settings["target_calibration"]["digest"] = samples.target.digest
    return scores


def test_samples_are_loaded_where_a_score_needs_them(world):
    samples = load_samples(*loaded("shield.score=target-contrast"))
    assert samples.source.digest != samples.target.digest and samples.before is not None and not samples.notes
    assert samples.target.n_samples == 3
    samples = load_samples(*loaded("shield.score=magnitude", "shield.also_score=[snr]"))
    assert samples.source is samples.target is samples.before is None
    samples = load_samples(*loaded("shield.score=magnitude", "shield.also_score=[]", "shield.norms=half-released"))
    assert samples.source is not None and samples.target is None
    for missing, key in (
        ("calibration.path", "shield.calibration.path: missing; the score 'target-contrast' reads source"),
        (
            "target_calibration.path",
            "shield.target_calibration.path: missing; the score 'target-contrast' reads target",
        ),
        ("change_from", "shield.change_from: missing; the score 'change'"),
    ):
        with pytest.raises(UserError, match=f"^{key}"):
            load_samples(*loaded("shield.score=target-contrast", f"shield.{missing}=null"))


def test_scores_that_were_made_with_something_else_are_noticed(world):
    run, source = loaded("shield.score=target-contrast")
    scores = made_scores(run, source)
    scores.save("run/scores.safetensors")
    assert not needs_scoring(run, source, begun=False)
    with pytest.raises(UserError, match="was made with other calibration samples"):
        needs_scoring(*loaded("shield.score=target-contrast", "shield.calibration.samples=2"), begun=False)
    with pytest.raises(
        UserError, match=r"was made with other target samples \(shield.target_calibration\); change that"
    ):
        needs_scoring(*loaded("shield.score=target-contrast", "shield.target_calibration.samples=2"), begun=False)
    make_model("llama", world / "later", seed=2, vocab_size=321, num_hidden_layers=2)
    other = "shield.change_from=later"
    with pytest.raises(
        UserError, match=r"compares with another checkpoint than shield.change_from: other weights"
    ) as told:
        needs_scoring(*loaded(other), begun=False)
    assert "\n" not in str(told.value)
    for granularity in ("column", "element"):
        run, source = loaded(other, "shield.score=change", f"shield.granularity={granularity}")
        with pytest.raises(UserError, match=r"compares with before, and shield.change_from names later: other weights"):
            write_plan(run, source, scores)
    run, source = loaded("shield.change_from=null", "shield.score=change")
    assert not needs_scoring(run, source, begun=False)  # what the run file does not name is not compared
    assert write_plan(run, source, scores).plan["change_from"] == scores.settings["change_from"]["fingerprint"]
    run, source = loaded("shield.change_from=null", "shield.score=change", "shield.granularity=element")
    with pytest.raises(UserError, match=r"shield.change_from: missing"):
        write_plan(run, source, scores)


def test_elements_by_change_are_planned_from_both_directories(world):
    run, source = loaded("shield.score=change", "shield.granularity=element")
    shield = write_plan(run, source, made_scores(run, source))
    name = "model.layers.1.mlp.up_proj.weight"
    weights, old = load_file("model/model.safetensors"), load_file("before/model.safetensors")
    moved, frozen = (weights[name] - old[name]).abs().numpy(), shield.masks[name].elements()
    assert frozen.sum() == moved.size // 2 and moved[frozen].min() > moved[~frozen].max() * (1 - 1e-4)


def test_the_checkpoint_to_compare_with_must_be_of_the_same_model(world):
    assert len(open_before("model", "before")) == len(open_source("model").checkpoint)
    config = json.loads((world / "before" / "config.json").read_text())

    def copied(name, change, **keys):
        shutil.copytree("before", name)
        tensors = load_file("before/model.safetensors")
        change(tensors)
        save_file(tensors, world / name / "model.safetensors", metadata={"format": "pt"})
        (world / name / "config.json").write_text(json.dumps({**config, **keys}))

    up = "model.layers.1.mlp.up_proj.weight"
    copied("olmo", lambda t: None, model_type="olmo2")
    copied("fewer", lambda t: t.pop(up))
    copied("more", lambda t: t.update(extra=torch.zeros(1)))
    copied("smaller", lambda t: t.update({up: t[up][1:].clone()}))
    copied("whole", lambda t: t.update({up: t[up].to(torch.int8)}))
    shutil.copytree("before", "cut")
    (world / "cut" / "model.safetensors").unlink()
    for name, words in (
        ("gone", "shield.change_from: must be a directory, got 'gone'"),
        ("olmo", "shield.change_from: olmo must be of model_type 'llama' like model, got 'olmo2'"),
        ("fewer", f"shield.change_from: fewer must have the tensors of model, but fewer lacks {up}, which model has"),
        ("more", "shield.change_from: more must have the tensors of model, but model lacks extra, which more has"),
        ("smaller", rf"shield.change_from: {up} must be \[96, 64\] as in model, got \[95, 64\] in smaller"),
        ("whole", f"shield.change_from: {up} must be F64, F32, BF16, F16, got I8 in whole"),
        ("cut", "cut: neither model.safetensors nor"),
    ):
        with pytest.raises(UserError, match=f"^{words}") as told:
            open_before("model", name)
        assert "\n" not in str(told.value)


def test_signal_to_noise_by_hand():
    basis = [torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n)))[0] for n in (4, 6)]
    singular = torch.tensor([8.0, 2.0, 1.8, 1.0])
    matrix = basis[0] @ torch.cat([torch.diag(singular), torch.zeros(4, 2)], 1) @ basis[1]
    # quartiles 3.5 and 1.6; threshold 1.9 / 1.349 * (1 + sqrt(4 / 6)) = 2.558, above which 8 lies alone
    assert signal_to_noise(matrix) == pytest.approx(8 / 4.8 / 8, rel=1e-5)
    assert signal_to_noise(matrix.t()) == pytest.approx(8 / 4.8 / 8, rel=1e-5)
    assert signal_to_noise(torch.zeros(3, 5)) == 0
    assert signal_to_noise(torch.eye(3)) == pytest.approx(3 / 3 * 3)  # nothing of it is noise, which counts as 1


def test_every_score_says_what_it_ranks():
    for name, score in registry.SCORES.items():
        for granularity in score.granularities:
            registry.check_granularity(name, granularity)
        assert score.granularities
    assert registry.SCORES["snr"].granularities == ("matrix", "layer")
    assert registry.needing_calibration(["snr", "fisher", "wanda"]) == ["fisher", "wanda"]
    assert "target-contrast" in registry.needing_target(registry.SCORES)
    assert "change" in registry.needing_change(registry.SCORES)
    assert registry.made_by_score(["wanda", "random", "change", "wanda"]) == ["change", "wanda"]


def test_a_score_that_does_not_fit_together_is_refused():
    for options, words in (
        ({"needs": "fwd"}, "needs must be one of"),
        ({"needs": "forward", "statistics": ("input_l1",)}, "input_l1"),
        ({"needs": "weights", "statistics": ("input_norm",)}, "needs must be 'forward'"),
        ({"needs": "backward"}, "gradients must be given"),
    ):
        with pytest.raises(ValueError, match=words):
            Score("mine", **options)
    with pytest.raises(ValueError, match="two scores are called wanda"):
        registry.by_name([*registry.SCORES.values(), registry.SCORES["wanda"]])


def test_contrast_is_scale_free():
    from megatron_ssu.scoring.target_contrast import contrast

    source, target = np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])
    np.testing.assert_allclose(contrast(source * 7, target), contrast(source, target / 9))
    assert (np.diff(contrast(source, target)) > 0).all()
    assert np.isfinite(contrast(source, np.zeros(3))).all()


@pytest.mark.process
def test_names_are_checked_without_torch():
    code = "import sys, megatron_ssu.scoring.registry, megatron_ssu.methods.options; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
