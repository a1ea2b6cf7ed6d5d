"""`inspect` and `compose` as commands: output, files, and one line for bad input."""

from __future__ import annotations

import json

import pytest

from megatron_ssu.cli import main
from megatron_ssu.shield.file import load_shield
from megatron_ssu.shield.plan import PlanOptions, plan_shield
from tests.unit.samples import matrices, scores_of, weights_of


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
    assert all(word in head for word in ("frozen", "share", "cut", "margin", "Jaccard", "shared"))
    assert sum("down_proj" in line and "column" in line for line in lines) == 2
    assert sorted(p.name for p in out.iterdir()) == ["frozen_share.png", "overlap.png", "scores.png"]
    table = json.loads((files / "table.json").read_text())
    assert len(table["matrices"]) == 14 and table["realised"]["linear"]["ratio"] == 0.5


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
