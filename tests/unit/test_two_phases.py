"""The instruction sets of examples/two_phases, and what its study trains and reports."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from rich.console import Console

from examples.two_phases import study, study_report, tasks
from megatron_ssu.methods.registry import read_run

SIZE = tasks.Size(train=120, heldout=30)
SETS = ("similar", "dissimilar", "language")


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    tasks.write_tasks(folder, 7, SIZE)
    return folder


def test_a_seed_gives_the_same_bytes(written, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    tasks.write_tasks(again, 7, SIZE)
    tasks.write_tasks(other, 8, SIZE)
    for file in written.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()
        assert file.read_bytes() != (other / file.name).read_bytes()


@pytest.mark.parametrize("name", SETS)
def test_nothing_held_out_is_trained_on(name, written):
    asked, held = (
        {row["messages"][0]["content"] for row in rows(written / file)}
        for file in (f"{name}.jsonl", f"heldout_{name}.jsonl")
    )
    assert asked and held and not asked & held
    if name == "similar":  # nor by way of the counterparts
        assert not held & {row["messages"][0]["content"] for row in rows(written / "counterparts.jsonl")}


def test_counterparts_ask_the_same_in_english(written):
    language, english = rows(written / "language.jsonl"), rows(written / "counterparts.jsonl")
    assert len(language) == len(english) == SIZE.train
    seen = {}
    for there, here in zip(language, english, strict=True):
        assert there["task"] == here["task"]
        question, answer = (message["content"] for message in here["messages"])
        assert question.startswith(there["task"].capitalize()) and answer.removeprefix("Answer: ") in question
        asked, answered = (message["content"] for message in there["messages"])
        assert re.search("[\u1200-\u137f]", asked) and not re.search("[a-z]", asked)
        assert answered.removeprefix("Answer: ") in asked
        if there["task"] == "deed":  # one word there for one word here
            deed = re.sub("(ies|es|s)$", "", answer)
            seen.setdefault(deed, set()).add(answered)
    assert seen


@pytest.mark.parametrize("english", [*study.ENGLISH, None])
@pytest.mark.parametrize("method", [*study.METHODS, None])
def test_every_cell_is_a_run_file(english, method, tmp_path):
    cell = study.Cell(english, 3, method if english else None)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(cell.run_file()))
    run = read_run(path)
    assert run.train.seed == 3 and run.data.seed == 1236
    assert run.checkpoint.export == cell.model and run.model.path == (
        "hf/base" if not cell.method else f"hf/{english}-3"
    )


def test_cells_have_names_of_their_own():
    cells = [*study.first_cells([1, 2]), *study.second_cells([1, 2])]
    assert len({cell.name for cell in cells}) == len(cells) == 2 * 3 + 2 * 2 * len(study.METHODS)


def test_the_report_is_of_means_and_deviations(tmp_path):
    def model(ea, ma):
        layers = {str(n): {"cosine": 0.5, "cka": 0.25, "covariance": 0.125} for n in range(2)}
        drift = {"weights": {"relative": 0.1, "moved": 0.5}, "hidden": {"kl": 2.0, "layers": layers}}
        return {"EA": ea, "MA": ma, "mean": (ea + ma) / 2, "drift": drift}

    pair = {
        "difference": 3.0,
        "relative_to_first_update": 0.75,
        "relative_to_second_update": 0.6,
        "cosine_of_updates": 0.5,
    }
    after = {"EA": 1.0, "MA": 0.0, "mean": 0.5}
    results = {
        "seeds": [1, 2],
        "similarity": {name: {"value": 0.9, "spread": 0.01} for name in study.ENGLISH},
        "apart": {name: [pair, pair] for name in study.ENGLISH},
        "models": {
            name: [{"after phase 1": after, "SSU": model(ea, 0.5)} for ea in (0.25, 0.75)] for name in study.ENGLISH
        },
    }
    study_report.write_report(tmp_path, results, Console(quiet=True))
    text = (tmp_path / "two-phases.md").read_text()
    assert text.count("| SSU | 0.500 ± 0.354 | 0.500 ± 0.000 | 0.500 ± 0.177 | 2.000 ± 0.000 | 0.500 ± 0.000 |") == 2
    assert text.count("| after phase 1 | 1.000 ± 0.000 | 0.000 ± 0.000 | 0.500 ± 0.000 |  |") == 2
    assert "| similar | 0.900 ± 0.010 | 3.000 ± 0.000 | 0.750 ± 0.000 | 0.600 ± 0.000 | 0.500 ± 0.000 |" in text
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "two-phases.png").stat().st_size > 10_000
