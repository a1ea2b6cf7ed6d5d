"""Phases of a run file: what each comes to, where it is, and what it may refer to."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ssu.config.load import dump_run, load_run, merged
from megatron_ssu.config.phases import checked_run, phase_named, phase_runs
from megatron_ssu.errors import UserError
from megatron_ssu.methods.layers import LayerOptions
from megatron_ssu.methods.registry import read_run

RUN = """
model: {path: hf}
checkpoint: {directory: runs/x, export: out}
shield: {ratio: 0.5, calibration: {path: chats.jsonl, samples: 8}}
data: {train: [a.jsonl], sequence_length: 64, source_valid: {old: v.jsonl}}
train: {iterations: 10, optimizer: {lr: 1.0e-3, weight_decay: 0.1}}
phases:
  - name: english
    method: {name: none}
  - name: swahili
    data: {train: [{path: b.jsonl, weight: 3}], source_valid: {new: w.jsonl}}
    train: {iterations: 20, optimizer: {lr: 1.0e-4}}
    shield: {ratio: 0.25}
  - name: more
    method: {name: layers, layers: {choose: changed, before: "phase:start"}}
    export: elsewhere
  - name: last
    shield: {reserve: ["phase:swahili", other.safetensors], change_from: "phase:english"}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def test_a_phase_takes_from_above_what_it_leaves_out(file):
    english, swahili, more, last = phase_runs(read_run(file))
    assert (english.method.name, swahili.method.name, more.method.name) == ("none", "ssu", "layers")
    assert [own.train.iterations for own in (english, swahili, last)] == [10, 20, 10]
    assert (swahili.train.optimizer["lr"], swahili.train.optimizer["weight_decay"]) == (1e-4, 0.1)
    assert (swahili.shield.ratio, swahili.shield.calibration.samples) == (0.25, 8)
    assert english.data.train == ["a.jsonl"] and swahili.data.train[0].path == "b.jsonl"
    assert swahili.data.source_valid == {"old": "v.jsonl", "new": "w.jsonl"}
    assert swahili.data.sequence_length == 64 and not swahili.phases


def test_a_phase_starts_from_the_model_before(file):
    runs = phase_runs(read_run(file))
    assert [own.checkpoint.directory for own in runs[:2]] == ["runs/x/phases/1-english", "runs/x/phases/2-swahili"]
    exports = ["runs/x/phases/1-english/model", "runs/x/phases/2-swahili/model", "elsewhere", "out"]
    assert [own.checkpoint.export for own in runs] == exports
    assert [own.model.path for own in runs] == ["hf", *exports[:-1]]
    assert {own.data.directory for own in runs} == {"runs/x/data"}


def test_earlier_phases_can_be_named(file):
    *_, more, last = phase_runs(read_run(file))
    assert more.shield.change_from == more.method.options["layers"].before == "hf"
    assert last.shield.change_from == "runs/x/phases/1-english/model"
    assert last.shield.reserve == ["runs/x/phases/2-swahili/shield.safetensors", "other.safetensors"]


def test_what_is_not_there_yet_is_left_out_of_the_check(file):
    run = read_run(file)
    more, last = checked_run(run, 2), checked_run(run, 3)
    assert more.model.path == last.model.path == "hf"
    assert more.method.options["layers"] == LayerOptions(choose="changed", before="hf")
    assert more.shield.score == "random" and more.shield.change_from is None
    assert last.shield.reserve == ["other.safetensors"]


def test_a_given_shield_is_the_one_that_is_named(file):
    file.write_text(RUN.replace("shield: {reserve:", "shield: {file: given.safetensors, reserve:"))
    assert phase_runs(read_run(file))[3].shield.file == "given.safetensors"
    file.write_text(RUN.replace("shield: {reserve:", 'shield: {file: "phase:swahili", reserve:'))
    run = read_run(file)
    assert phase_runs(run)[3].shield.file == "runs/x/phases/2-swahili/shield.safetensors"
    assert checked_run(run, 3).shield.file is None


def test_a_resolved_run_file_is_the_same_run(file, tmp_path):
    run = read_run(file)
    again = tmp_path / "again.yaml"
    again.write_text(dump_run(run))
    assert read_run(again) == run
    single = tmp_path / "single.yaml"
    single.write_text(dump_run(phase_runs(run)[1]))
    assert read_run(single) == phase_runs(run)[1]


def test_one_length_stands_for_the_others():
    above = {"train": {"iterations": 5, "seed": 1}, "replay": {"fraction": 0.1, "path": "a"}}
    own = {"train": {"tokens": 100}, "replay": {"generate": {"prompts": "p"}}}
    assert merged(above, own) == {
        "train": {"tokens": 100, "seed": 1},
        "replay": {"fraction": 0.1, "generate": {"prompts": "p"}},
    }
    assert merged(above, {"train": {"tokens": None}})["train"] == {"iterations": 5, "seed": 1, "tokens": None}
    assert above["train"] == {"iterations": 5, "seed": 1}


def test_a_phase_is_picked_by_name(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = read_run(file)
    assert phase_named(run, "more").method.name == "layers"
    assert phase_named(run, None).checkpoint.directory.endswith("1-english")
    Path("runs/x/phases/2-swahili").mkdir(parents=True)
    assert phase_named(run, None).checkpoint.directory.endswith("2-swahili")
    with pytest.raises(UserError, match=r"--phase: must be one of english, swahili, more, last, got 'Swahili'"):
        phase_named(run, "Swahili")


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("name: swahili", "name: english", ("phases.1.name", "names an earlier phase")),
        ("name: swahili", "name: a/b", ("phases.1.name", "letters, digits")),
        ("  - name: swahili\n", "  - method: {name: ssu}\n", ("phases.1.name", "missing")),
        ("method: {name: none}", "method: none", ("phases.0.method", "expected a mapping")),
        ("method: {name: none}", "checkpoint: {keep: 1}", ("phases.0.checkpoint", "unknown key", "method, shield, data")),
        ("method: {name: none}", "model: {path: x}", ("phases.0.model", "unknown key")),
        ("method: {name: none}", "iterations: 3", ("phases.0.iterations", "belongs under train")),
        ("method: {name: none}", "optimizer: fresch", ("phases.0.optimizer", "fresh", "kept")),
        ("method: {name: none}", "train: {iterations: many}", ("run.yaml:9", "phases.0.train.iterations")),
        ("method: {name: none}", "train: {optimizer: {lr: x}}", ("run.yaml:9", "phases.0.train.optimizer.lr")),
        ("method: {name: none}", "data: {train: [{path: 3}]}", ("run.yaml:9", "phases.0.data.train")),
        ("method: {name: none}", "method: {name: nome}", ("run.yaml:9", "phases.0.method.name", "nome")),
        ("iterations: 10", "iterations: ten", ("run.yaml:6", "train.iterations")),
        ("before: \"phase:start\"", "before: \"phase:more\"", ("phases.2.", "phase:start, phase:english, phase:swahili")),
        ("[\"phase:swahili\", ", "[\"phase:none\", ", ("phases.3.shield.reserve", "phase:english, phase:swahili, phase:more")),
        ("phases:\n", "phases: 3\nlog:\n", ("phases", "expected a list")),
        ("phases:\n", "train.phase: {number: 2}\nphases:\n", ("unknown section",)),
    ],
)  # fmt: skip
def test_mistakes_are_named_where_they_stand(file, before, after, words):
    text = RUN.replace(before, after, 1)
    if after.startswith("phases: 3"):
        text = text[: text.index("log:")]
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        phase_runs(read_run(file))
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_the_old_section_has_its_remedy(file):
    file.write_text("model: {path: hf}\ncheckpoint: {directory: x}\ntrain: {phase: {number: 2}}\n")
    with pytest.raises(UserError, match=r"run\.yaml:3: train\.phase: is the list `phases` now"):
        load_run(file)


def test_overrides_reach_a_phase(file):
    runs = phase_runs(read_run(file, ["phases.1.train.iterations=7", "train.seed=5"]))
    assert [own.train.iterations for own in runs] == [10, 7, 10, 10] and {own.train.seed for own in runs} == {5}
