"""Replay in whole runs: its share of what is read, and answers of the model that a phase starts from."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_ssu.cli import main
from tests.dist import packing_work, phases_work
from tests.dist.ranks import RankError
from tests.dist.test_methods import make_world
from tests.dist.test_packing import tokens_of
from tests.dist.test_packing import write as write_run

CHATS, TEXT = "world/chat.jsonl", "world/target_train.jsonl"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("replay"))
    lines = (folder / "world" / "heldout_chat.jsonl").read_text().splitlines()[:30]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "bad.jsonl").write_text(lines[0] + '\n{"messages": []}\n')
    return folder


def test_real_data_has_its_fraction(ranks, world):
    data = {"weights_in": "tokens", "train": TEXT, "loss_on": "answers"}
    file = write_run(world, "real", data, iterations=30)
    overrides = ["replay.fraction=0.2", f"replay.path=[{{path: {CHATS}, packing: documents}}]"]
    result = ranks.run(packing_work.counted_run, 2, file, str(world), overrides)[0]
    found = tokens_of(world, result)
    assert found["chats"] / found.total() == pytest.approx(0.2, rel=0.01)


PHASES = {
    "model": {"path": "hf/source"},
    "precision": {"dtype": "fp32"},
    "method": {"name": "none"},
    "data": {"sequence_length": 64, "loader_workers": 0, "loss_on": "answers", "packing": "documents"},
    "train": {"iterations": 2, "micro_batch_size": 2, "global_batch_size": 8, "eval_interval": 0, "eval_batches": 0},
    "log": {"interval": 2, "tensorboard": False},
    "phases": [
        {"name": "one", "data": {"train": CHATS}},
        {
            "name": "two",
            "data": {"train": [{"path": TEXT, "packing": "stream"}]},
            "replay": {
                "fraction": 0.25,
                "generate": {
                    **{"prompts": "prompts.jsonl", "samples": 8, "max_new_tokens": 16, "temperature": 0.8, "dtype": "fp32"},
                    "filter": {"ends": False, "max_repetition": 1.0},
                },
            },
            "train": {"iterations": 3},
        },
    ],
}  # fmt: skip


def write(world, name, **prompts):
    run = json.loads(json.dumps(PHASES)) | {"checkpoint": {"directory": f"runs/{name}", "interval": 1}}
    run["phases"][1]["replay"]["generate"] |= prompts
    (world / f"{name}.yaml").write_text(yaml.safe_dump(run))
    return str(world / f"{name}.yaml")


def test_a_phase_replays_what_its_model_answers(ranks, world, monkeypatch, capsys):
    straight = ranks.run(phases_work.phases, 1, write(world, "straight"), str(world), [], [])[0]
    assert "replay: answering 8 prompts" in straight["said"]
    folder = world / "runs" / "straight" / "phases"
    answers = (folder / "2-two" / "replay.jsonl").read_text()
    monkeypatch.chdir(world)
    command = (
        f"generate {folder}/1-one/model prompts.jsonl --output again.jsonl --samples 8 --max-new-tokens 16 --dtype fp32"
    )
    with pytest.raises(SystemExit) as status:
        main([*command.split(), "--temperature", "0.8", "--unended", "--max-repetition", "1.0"])
    assert status.value.code == 0, capsys.readouterr().err
    assert (world / "again.jsonl").read_text() == answers
    records = [json.loads(line) for line in (folder / "2-two" / "metrics.jsonl").read_text().splitlines()]
    read = [key for record in records for key in record if key.startswith("samples_read/")]
    assert any("replay.jsonl" in key for key in read)

    stopped = ranks.run(phases_work.phases, 2, write(world, "stopped"), str(world), [], [3, 1])[0]
    assert stopped["said"].count("replay: answering") == 1, "answers are made once"
    other = world / "runs" / "stopped" / "phases"
    assert (other / "2-two" / "replay.jsonl").exists()
    one, two = (load_file(f / "1-one" / "model" / "model.safetensors") for f in (folder, other))
    assert one.keys() == two.keys()
    both = ranks.run(phases_work.phases, 2, write(world, "both"), str(world), [], [])[0]
    assert both["iterations"] == [2, 3]
    one, two = (
        load_file(world / "runs" / n / "phases" / "2-two" / "model" / "model.safetensors") for n in ("both", "stopped")
    )
    assert all(torch.equal(one[key], two[key]) for key in one), "the same bits after any stop"


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ({"prompts": "bad.jsonl"}, ("phase two", "bad.jsonl:2", "not a list of turns")),
        ({"prompts": "none.jsonl"}, ("phase two", "replay.generate.prompts", "none.jsonl")),
        ({"max_new_tokens": 5000}, ("phase two", "prompts.jsonl:", "positions")),
        ({"temperature": -1.0}, ("phase two", "replay.generate.temperature")),
        ({"filter": {"language": "english"}}, ("phase two", "replay.generate.filter.language", "'english'")),
    ],
)
def test_bad_prompts_are_refused_before_the_first_phase(ranks, world, prompts, words):
    with pytest.raises(RankError) as caught:
        ranks.run(phases_work.phases, 2, write(world, "refused", **prompts), str(world), [], [])
    assert all(word in caught.value.message for word in words), caught.value.message
    assert not (world / "runs" / "refused" / "phases").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["replay.fraction=1.0"], ("replay.fraction", "less than 1, got 1.0")),
        (["replay.fraction={start: 0.2, end: 1.5}"], ("replay.fraction", "0.2 to 1.5")),
        (["replay.fraction=0.1"], ("replay.path: missing",)),
        (
            ["replay.fraction=0.1", f"replay.path={CHATS}", "replay.generate={prompts: prompts.jsonl}"],
            ("does not go with",),
        ),
        (["replay.fraction=0.1", "replay.path=none.jsonl"], ("replay.path", "none.jsonl")),
    ],
)
def test_bad_replay_is_one_line(ranks, world, overrides, words):
    file = write_run(world, "bad-replay", {"train": TEXT})
    with pytest.raises(RankError) as caught:
        ranks.run(packing_work.counted_run, 1, file, str(world), overrides)
    assert all(word in caught.value.message for word in words), caught.value.message
