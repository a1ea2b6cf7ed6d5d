"""`inspect` and `compose` as commands: output, files, and one line for bad input."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from megatron_ssu.cli import main
from megatron_ssu.errors import UserError
from megatron_ssu.methods.options import check_names
from megatron_ssu.methods.registry import read_run
from megatron_ssu.methods.scored import check_replaceable
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.source import open_source
from megatron_ssu.shield.plan import PlanOptions, plan_shield
from megatron_ssu.shield.shield_file import load_shield
from tests.models import make_model
from tests.unit.data_makers import make_hf_tokenizer
from tests.unit.samples import matrices, scores_of, weights_of

LIGHT = """
import sys
from megatron_ssu.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert not ended.code, ended.code
assert not {LIGHT} & set(sys.modules)
"""


@pytest.fixture
def files(tmp_path):
    """Two shields and the scores of one model, and a shield of another model."""
    members = matrices(layers=2)
    scores = scores_of(members, weights_of(members))
    scores.save(tmp_path / "scores")
    plan_shield(scores, PlanOptions(), method="ssu").save(tmp_path / "a")
    plan_shield(scores, PlanOptions(score="magnitude"), method="ssu").save(tmp_path / "b")
    scores.model, scores.fingerprint = "stranger", "cd" * 32
    plan_shield(scores, PlanOptions(), method="ssu").save(tmp_path / "other")
    return tmp_path


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    return ended.value.code


def refused(capsys, *arguments) -> str:
    """The one line that a refused command prints."""
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


def test_inspect_prints_draws_and_writes(files, capsys):
    out = files / "pictures"
    options = ("--scores", files / "scores", "--compare", files / "b", "--output", out, "--json", files / "table.json")
    assert run("inspect", files / "a", *options) == 0
    lines = capsys.readouterr().out.splitlines()
    (head,) = [line for line in lines if "layer" in line and "matrix" in line]
    assert all(word in head for word in ("frozen", "fraction", "cut", "margin", "Jaccard", "shared"))
    assert sum("down_proj" in line and "column" in line for line in lines) == 2
    assert sorted(p.name for p in out.iterdir()) == ["frozen_share.png", "overlap.png", "scores.png"]
    table = json.loads((files / "table.json").read_text())
    assert len(table["matrices"]) == 14 and table["realised"]["linear"]["ratio"] == 0.5


def test_pictures_without_matplotlib_are_refused_before_the_work(files, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = refused(capsys, "inspect", files / "absent", "--output", files / "pictures")
    assert "--output: needs matplotlib" in message and 'pip install "megatron-ssu[plots]"' in message
    assert run("inspect", files / "a") == 0


def test_compose_writes_a_shield(files, capsys):
    for operation in ("union", "intersection", "difference"):
        assert run("compose", operation, files / "a", files / "b", "--output", files / operation) == 0
        assert operation in capsys.readouterr().out
    counts = {n: load_shield(files / n).realised()["linear"]["frozen"] for n in ("a", "b", "union", "intersection")}
    assert counts["union"] + counts["intersection"] == counts["a"] + counts["b"]
    assert counts["intersection"] < counts["a"] < counts["union"]


def test_bad_input_is_one_line_and_writes_nothing(files, capsys):
    before = sorted(files.iterdir())
    for command in (("compose", "union", files / "a", files / "other", "--output", files / "new"),):
        told = refused(capsys, *command)
        assert "tiny" in told and "stranger" in told
    told = refused(capsys, "inspect", files / "a", "--compare", files / "other", "--output", files / "pictures")
    assert "tiny" in told and "stranger" in told
    assert "already exists" in refused(capsys, "compose", "union", files / "a", files / "b", "--output", files / "b")
    assert "two shield files" in refused(capsys, "compose", "union", files / "a", "--output", files / "new")
    assert "absent" in refused(capsys, "inspect", files / "absent")
    os.mkfifo(files / "pipe")
    before = sorted(files.iterdir())
    for option, place, why in (
        ("--json", files / "pipe", "is not a regular file"),
        ("--json", ".", "is a directory"),
        ("--json", "/", "is a directory"),
        ("--output", files / "a", "is a file"),
        ("--output", files / "a" / "x", "is a file"),
    ):
        told = refused(capsys, "inspect", files / "a", option, place)
        assert f": {place}: " in told and why in told
    assert str(files / "scores") in refused(capsys, "inspect", files / "scores")
    for name in ("a", "scores"):
        raw = (files / name).read_bytes()
        for number, damaged in enumerate((raw[:-9], raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])):
            bad = files / f"bad-{name}-{number}"
            bad.write_bytes(damaged)
            arguments = (bad,) if name == "a" else (files / "a", "--scores", bad)
            assert bad.name in refused(capsys, "inspect", *arguments, "--output", files / "pictures")
            bad.unlink()
    assert sorted(files.iterdir()) == before


def test_score_names_the_key_and_what_holds_its_place(tmp_path):
    (tmp_path / "run.yaml").write_text(f"model: {{path: {tmp_path}}}\ncheckpoint: {{directory: {tmp_path}}}\n")
    place = tmp_path / "scores.safetensors"
    place.write_bytes(b"mine")
    run = read_run(tmp_path / "run.yaml")
    with pytest.raises(
        UserError, match=f"^{place}: not a scores file, .*; it is not replaced: remove it first$"
    ) as caught:
        check_replaceable(run, None)
    assert "make it again" not in str(caught.value)
    run.shield.also_score = ["hessian"]
    with pytest.raises(UserError, match=r"^shield\.also_score: 'hessian'"):
        check_names(run)
    assert place.read_bytes() == b"mine"


def test_plan_keeps_the_shield_of_another_method(tmp_path, capsys):
    model = make_model("llama", tmp_path / "model")
    source = open_source(model)
    scores = scores_of({m.name: m for m in source.family.matrices(source.dims)}, load_file(model / "model.safetensors"))
    scores.fingerprint = model_fingerprint(model)
    scores.save(tmp_path / "scores.safetensors")
    plan_shield(scores, PlanOptions(), method="lota").save(tmp_path / "shield.safetensors")
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {model}}}\ncheckpoint: {{directory: {tmp_path}}}\nshield: {{special_tokens: false}}\n"
        "precision: {dtype: fp32}\n"
    )
    before = (tmp_path / "shield.safetensors").read_bytes()
    capsys.readouterr()
    assert "is the shield of method lota and is not replaced" in refused(capsys, "plan", tmp_path / "run.yaml")
    assert "has no shield that `plan` makes" in refused(capsys, "plan", tmp_path / "run.yaml", "method.name=lora")
    told = refused(
        capsys, "plan", tmp_path / "run.yaml", "method.name=lora", "method.lora.shielded=true", "method.lora.rank=4"
    )
    assert "is the shield of method lota" in told
    assert (tmp_path / "shield.safetensors").read_bytes() == before


def test_a_model_that_is_not_supported_is_named_by_its_file(tmp_path):
    model = make_model("llama", tmp_path / "model")
    hf = json.loads((model / "config.json").read_text())
    for change, words in (
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"vocab_size": None}, "vocab_size is missing"),
    ):
        changed = {k: v for k, v in {**hf, **change}.items() if v is not None}
        (model / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=f"^{model}/config.json: {words}"):
            open_source(model)


@pytest.mark.process
def test_a_full_disk_is_one_line(files):
    command = [
        sys.executable,
        "-m",
        "megatron_ssu",
        "compose",
        "union",
        files / "a",
        files / "b",
        "--output",
        files / "new",
    ]
    before = sorted(files.iterdir())
    done = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (99, 99))
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "new: cannot be written" in done.stderr, (
        done.stderr
    )
    assert sorted(files.iterdir()) == before


@pytest.mark.process
def test_commands_on_small_files_import_no_megatron(tmp_path):
    """Nor torch, whose import takes longer than their work; plan has transformers read config.json, which imports it."""
    model = make_model("llama", tmp_path / "model", vocab_size=321)
    source = open_source(model)
    scores = scores_of({m.name: m for m in source.family.matrices(source.dims)}, load_file(model / "model.safetensors"))
    scores.fingerprint = model_fingerprint(model)
    scores.save(tmp_path / "scores.safetensors")
    shutil.copytree(model, tmp_path / "adapted")
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {model}}}\ncheckpoint: {{directory: {tmp_path}}}\nshield: {{special_tokens: false}}\n"
        "parallel: {tensor_model_parallel_size: 2}\n"
    )
    shield = str(tmp_path / "shield.safetensors")
    make_hf_tokenizer(model)
    for command in (
        ["plan", str(tmp_path / "run.yaml"), "shield.ratio=0.125", "shield.special_tokens=true"],
        ["plan", str(tmp_path / "run.yaml"), "shield.ratio=0.25"],
        ["inspect", shield, "--scores", str(tmp_path / "scores.safetensors"), "--output", str(tmp_path / "pictures")],
        ["compose", "union", shield, shield, "--output", str(tmp_path / "both")],
        ["verify", "--source", str(model), "--adapted", str(tmp_path / "adapted"), "--shield", shield],
        ["--help"],
    ):
        left_out = '"megatron.core"' if command[0] == "plan" else '"torch", "megatron.core"'
        code = LIGHT.replace("{LIGHT}", f"{{{left_out}}}")
        done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", (command, done.stderr)
