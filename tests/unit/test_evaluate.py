"""Evaluation in one process: measures, forgetting with its interval, the harness, the command."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_ssu import cli
from megatron_ssu.commands.evaluate import named
from megatron_ssu.config.checks.evaluate import validate_evaluate
from megatron_ssu.config.schema import BestSection, RuleSection
from megatron_ssu.errors import UserError
from megatron_ssu.evaluate.chats import Chat, Chats, Said, measure_chats
from megatron_ssu.evaluate.harness import HarnessModel, TaskOptions, run_tasks
from megatron_ssu.evaluate.hugging_face import HuggingFaceModel, until_end
from megatron_ssu.evaluate.languages import identifier, script_of
from megatron_ssu.evaluate.measured import Measured, change, interval, ratio
from megatron_ssu.evaluate.model import Row
from megatron_ssu.evaluate.rules import Figure, better, met, worse_by
from megatron_ssu.evaluate.texts import measure_texts, read_texts, windows
from megatron_ssu.methods.registry import read_run
from tests.dist.evaluate_work import ask
from tests.models import make_model
from tests.unit.data_makers import TEXTS, make_hf_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two random models with tokenizers, texts and chats, in a folder."""
    folder = tmp_path_factory.mktemp("evaluate")
    for seed, name in enumerate(("first", "second")):
        make_hf_tokenizer(make_model("llama", folder / name, num_hidden_layers=2, vocab_size=321, seed=seed))
    write_jsonl(folder / "text.jsonl", [*TEXTS, "a longer text " * 40])
    chats = [{"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": t[:5]}]} for t in TEXTS]
    lines = [json.dumps(chat | {"task": "ab"[i % 2]}) for i, chat in enumerate(chats)]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("length", [1, 4, 7, 100])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 14, 15])
def test_windows_are_those_of_the_harness(count, length):
    ids = list(range(10, 10 + count))
    theirs = [([*a, b[-1]], len(b)) for a, b in get_rolling_token_windows(ids, 1, length, 1)]
    assert [(row.ids, row.scored) for row in windows(1, ids, length)] == theirs
    assert sum(row.scored for row in windows(1, ids, length)) == count


def test_losses_are_those_of_transformers(models):
    texts = read_texts("text", models / "text.jsonl")
    model = HuggingFaceModel("first", models / "first", batch_size=3)
    found = {m.metric: m for m in measure_texts(model, texts, 64)}
    plain = AutoModelForCausalLM.from_pretrained(models / "first", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(models / "first")
    losses, tokens = [], 0
    for text in texts.documents:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        loss = 0.0
        for first in range(1, len(ids), 64):
            last = min(first + 64, len(ids))
            part = torch.tensor([ids[max(0, last - 65) if first > 1 else 0 : last]])
            with torch.no_grad():
                logprobs = torch.log_softmax(plain(part).logits[0, :-1].double(), -1)
            wanted = logprobs.gather(1, part[0, 1:, None])[:, 0]
            loss -= float(wanted[-(last - first) :].sum())
        losses.append(loss)
        tokens += len(ids) - 1
    size = sum(len(text.encode()) for text in texts.documents)
    assert found["loss_per_token"].value == pytest.approx(sum(losses) / tokens, rel=1e-5)
    assert found["loss_per_byte"].value == pytest.approx(sum(losses) / size, rel=1e-5)
    assert list(found["loss_per_byte"].numerators) == pytest.approx(losses, rel=1e-5)
    assert found["loss_per_byte"].facts["digest"] == texts.digest


def test_forgetting_is_relative_to_the_source_and_worse_is_positive():
    source, worse = ratio("d", "acc", "higher", [1, 1, 0, 1]), ratio("d", "acc", "higher", [1, 0, 0, 0])
    assert change(source, worse).percent == pytest.approx(100 * (0.75 - 0.25) / 0.75)
    assert change(source, source) == change(source, ratio("d", "acc", "higher", [1, 1, 0, 1]))
    assert (change(source, source).percent, change(source, source).low, change(source, source).high) == (0, 0, 0)
    loss, higher = ratio("d", "loss", "lower", [2, 4], [1, 3]), ratio("d", "loss", "lower", [3, 4], [1, 3])
    assert loss.value == 1.5 and change(loss, higher).percent == pytest.approx(100 * (1.75 - 1.5) / 1.5)
    assert change(ratio("d", "share", None, [1]), ratio("d", "share", None, [0])) is None
    assert change(ratio("d", "acc", "higher", [0]), source) is None
    alone = Measured("d", "acc", 0.5, "higher")
    assert change(alone, alone).low is None and interval(alone) is None


def test_the_interval_is_as_wide_as_it_should_be():
    """Against the normal approximation, for a mean; and paired: models that err alike differ by little."""
    draw = np.random.default_rng(0)
    hits = (draw.random(400) < 0.7).astype(float)
    low, high = interval(ratio("d", "acc", "higher", hits))
    width = 2 * 1.96 * hits.std() / math.sqrt(hits.size)
    assert low < hits.mean() < high and high - low == pytest.approx(width, rel=0.1)
    other = hits.copy()
    other[np.flatnonzero(other)[:8]] = 0
    paired = change(ratio("d", "acc", "higher", hits), ratio("d", "acc", "higher", other))
    unpaired = change(ratio("d", "acc", "higher", hits), ratio("d", "acc", "higher", draw.permutation(other)))
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 3
    assert 0 < paired.low < paired.percent < paired.high


@pytest.mark.parametrize(
    ("text", "script"),
    [("hello, 12", "latin"), ("ሰላም ነው", "ethiopic"), ("hello ሰላም", "mixed"), ("12 !", "none"), ("привет", "cyrillic")],
)
def test_scripts(text, script):
    assert script_of(text) == script


def test_identifiers_are_pluggable():
    assert identifier("os.path:basename")("a/b") == "b"
    assert identifier("script") is script_of
    for name, match in (
        ("klingon", "must be auto, script"),
        ("os.path:none", "cannot be had"),
        ("nowhere.at:all", "cannot be had"),
    ):
        with pytest.raises(UserError, match=match):
            identifier(name)


def test_answers_are_counted():
    def chat(prompt, reference, task):
        return Chat(1, [{"role": "user", "content": prompt}], reference, task)

    asked = [chat("one", "eins", "x"), chat("ሰላም", "ሰላም", "y"), chat("two", "zwei", "y"), chat("ok", None, None)]
    chats = Chats("c", "c.jsonl", asked, "d")
    loop = list(range(5)) * 3
    answers = [Said("eins", [1], True), Said("hello", [2], True), Said("zwei ", loop, False), Said("ja", [3], False)]
    found = {m.metric: m.value for m in measure_chats(chats, answers, script_of, {})}
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert (found["exact_match/x"], found["exact_match/y"]) == (1, 0)
    assert (found["ended"], found["ended/ethiopic"], found["ended/latin"]) == (0.5, 1, pytest.approx(1 / 3))
    assert found["in_language"] == 0.75 and found["language/latin"] == 1
    assert found["repetition"] == pytest.approx((1 - 5 / 12) / 4)


def test_an_answer_goes_up_to_its_end():
    assert until_end([5, 6, 0, 7], [0], None) == [5, 6, 0]
    assert until_end([5, 6, 7, 0], [0], lambda ids: sum(ids) > 10) == [5, 6]
    assert until_end([5, 6], [0], None) == [5, 6]


REQUESTS = {
    "loglikelihood": [(a, b) for a, b in pairwise(TEXTS)] + [("", "abc"), ("long " * 90, "end")],
    "loglikelihood_rolling": [(text * 8,) for text in TEXTS],
    "generate_until": [(text, {"until": ["e"], "max_gen_toks": 8 + i % 2}) for i, text in enumerate(TEXTS)],
}


def test_the_harness_gets_what_its_own_class_gives(models):
    ours = HarnessModel(HuggingFaceModel("first", models / "first", batch_size=3), models / "first")
    theirs = HFLM(pretrained=str(models / "first"), dtype="float32", device="cpu", batch_size=1, max_length=128)
    found, expected = ask(ours, REQUESTS), ask(theirs, REQUESTS)
    for (a, greedy), (b, wanted) in zip(found["loglikelihood"], expected["loglikelihood"], strict=True):
        assert a == pytest.approx(b, abs=1e-4) and greedy == wanted
    assert found["loglikelihood_rolling"] == pytest.approx(expected["loglikelihood_rolling"], abs=1e-3)
    assert found["generate_until"] == expected["generate_until"]


TASK = """\
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 3}}
"""


def make_task(folder: Path) -> Path:
    draw = np.random.default_rng(1)
    rows = [
        {"question": f"{t[:9]}:", "choices": [" red", " blue", " green"], "answer": int(draw.integers(3))}
        for t in TEXTS
    ]
    (folder / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "colours.yaml").write_text(TASK.format(data=folder / "rows.json"))
    return folder / "colours.yaml"


def test_a_task_file_is_asked(models, tmp_path):
    task, model = make_task(tmp_path), HuggingFaceModel("first", models / "first")
    (found,) = run_tasks(model, TaskOptions((str(task),)), models / "first")
    assert (found.data, found.metric, found.better, found.facts["version"]) == ("colours", "acc", "higher", 3)
    rows = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    hits = []
    for row in rows:
        scores = []
        for choice in row["choices"]:
            context = model.tokenizer.encode(row["question"])
            whole = model.tokenizer.encode(row["question"] + choice)
            scores.append(model.score([Row(whole, len(whole) - len(context))])[0].logprob)
        hits.append(float(np.argmax(scores) == row["answer"]))
    assert list(found.numerators) == hits and found.value == pytest.approx(np.mean(hits))
    assert run_tasks(model, TaskOptions(("colours",), include=str(tmp_path), limit=3), models / "first")[0].items == 3


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    return ended.value.code


def test_two_models_side_by_side(models, tmp_path, capfd):
    pair = (f"source={models / 'first'}", f"other={models / 'second'}", f"same={models / 'first'}")
    asked = (
        "--texts",
        models / "text.jsonl",
        "--chats",
        f"chat={models / 'chats.jsonl'}",
        "--tasks",
        make_task(tmp_path),
    )
    more = ("--max-new-tokens", 6, "--output", tmp_path / "r.jsonl", "--answers", tmp_path / "answers")
    assert run("evaluate", *pair, *asked, *more) == 0
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    found = {(line["model"], line["data"], line["metric"]): line for line in lines}
    assert {line["data"] for line in lines} == {"text", "chat", "colours"}
    other, same = found["other", "text", "loss_per_byte"], found["same", "text", "loss_per_byte"]
    source = found["source", "text", "loss_per_byte"]
    assert other["forgetting"]["percent"] == pytest.approx(100 * (other["value"] / source["value"] - 1))
    assert other["forgetting"]["low"] <= other["forgetting"]["percent"] <= other["forgetting"]["high"]
    assert same["forgetting"] == {"percent": 0, "low": 0, "high": 0} and source["forgetting"] is None
    assert (source["fingerprint"], source["value"]) == (same["fingerprint"], same["value"])
    assert {"megatron-ssu", "torch", "lm-eval"} == set(source["versions"]) and source["backend"].startswith(
        "transformers 5"
    )
    assert source["low"] < source["value"] < source["high"]
    assert found["source", "chat", "exact_match/a"]["items"] + found["source", "chat", "exact_match/b"]["items"] == len(
        TEXTS
    )
    assert sorted(p.name for p in (tmp_path / "answers").iterdir()) == [
        f"{n}-chat.jsonl" for n in ("other", "same", "source")
    ]
    out = capfd.readouterr().out
    assert "forgetting (95 % interval)" in out and "+0.0 % (+0.0 to +0.0)" in out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("first",), "evaluate: nothing to measure"),
        (("first", "--texts", "none.jsonl"), "none.jsonl: cannot be read"),
        (("first", "first", "--texts", "text.jsonl"), "two models are called first; write NAME=MODEL"),
        (("first", "--texts", "text.jsonl", "a/text.json"), "two files are called text"),
        (("first", "--texts", "chats.jsonl"), "chats.jsonl:1: no 'text' in it"),
        (("first", "--chats", "bad.jsonl"), "bad.jsonl:1: broken JSON"),
        (("first", "--chats", "chats.jsonl", "--max-new-tokens", "128"), "128 new ones are more than the 128 positions"),
        (("first", "--tasks", "none.yaml"), "none.yaml: no such file"),
        (("none", "--texts", "text.jsonl"), "none"),
        (("first", "--texts", "text.jsonl", "--limit", "0"), "--limit: must be at least 1, got 0"),
        (("first", "--texts", "text.jsonl", "--output", "no/r.jsonl"), "no/r.jsonl: cannot be written"),
        (("first", "--texts", "text.jsonl", "--identifier", "x"), "--identifier: must be auto"),
        (("untemplated", "--chats", "chats.jsonl"), "has no chat template"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_line(models, monkeypatch, capfd, arguments, line):
    monkeypatch.chdir(models)
    (models / "a").mkdir(exist_ok=True)
    shutil.copy(models / "text.jsonl", models / "a" / "text.json")
    (models / "bad.jsonl").write_text("{\n")
    if not (models / "untemplated").exists():
        shutil.copytree(models / "first", models / "untemplated")
        make_hf_tokenizer(models / "untemplated", template=None)
        (models / "untemplated" / "chat_template.jinja").unlink(missing_ok=True)
    assert run("evaluate", *arguments) == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert line in said[-1] and said[-1].startswith("megatron-ssu: ")


@pytest.mark.slow  # the harness looks through its thousands of tasks
def test_a_name_that_is_no_task(models, capfd):
    assert run("evaluate", models / "first", "--tasks", "no_such_task") == 2
    assert "--tasks: 'no_such_task' is not a task of lm-evaluation-harness" in capfd.readouterr().err


def test_under_torchrun_a_mesh_is_asked_for(models, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("evaluate", models / "first", "--texts", models / "text.jsonl") == 2
    assert "--run-file: missing; under torchrun" in capfd.readouterr().err


def test_names_of_models(models, tmp_path):
    (tmp_path / "amharic").mkdir()
    (tmp_path / "amharic" / "run.yaml").write_text("")
    at = named(f"{tmp_path / 'amharic'}@400")
    assert (at.name, at.run, at.iteration) == ("amharic", tmp_path / "amharic" / "run.yaml", 400)
    assert named(str(tmp_path / "amharic" / "run.yaml")).iteration is None
    assert named("x=org/name@abc").run is None and named("x=org/name@abc").path == "org/name@abc"
    assert named(str(models / "first")).name == "first"


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({"stop_when": {"figure": "source_loss", "worse_by": 3}}, "evaluate.stop_when.figure: must be a figure of this run"),
        ({"stop_when": {"figure": "source_valid_loss", "worse_by": -1}}, "evaluate.stop_when.worse_by: must be at least 0"),
        ({"texts": {"a": "none.jsonl"}}, "evaluate.texts.a: 'none.jsonl' does not exist"),
        ({"interval": -1}, "evaluate.interval: must be at least 0"),
        ({"best": {"figure": "evaluate/x/acc"}}, "evaluate.best.figure: must be a figure of this run"),
        ({"intervall": 3}, "evaluate.intervall"),
        ({"tasks": ["x"]}, "not asked with parallel.virtual_pipeline_model_parallel_size: 2"),
    ],
)  # fmt: skip
def test_a_section_that_is_wrong_is_refused(tmp_path, section, line):
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "model": {"path": "m"},
                "checkpoint": {"directory": "r"},
                "data": {"source_valid": "e.jsonl"},
                "evaluate": section,
                "parallel": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            }
        )
    )
    with pytest.raises(UserError, match=re.escape(line)):
        validate_evaluate(read_run(str(tmp_path / "run.yaml")))


def test_rules():
    rule = RuleSection("source_valid_loss", 3)
    start = {"source_valid_loss": 2.0, "evaluate/a/acc": 0.5}

    def now(loss, acc):
        return {"source_valid_loss": Figure(loss, "lower"), "evaluate/a/acc": Figure(acc, "higher")}

    assert met(rule, start, now(2.07, 0)) and not met(rule, start, now(2.05, 0))
    assert met(replace(rule, figure="evaluate/a/acc"), start, now(2, 0.4)) and not met(rule, {}, now(9, 0))
    assert worse_by(replace(rule, figure="evaluate/a/acc"), start, now(2, 0.4)) == pytest.approx(20)
    best = BestSection("evaluate/a/acc", rule)
    assert better(best, start, None, now(2, 0.1)) and better(best, start, 0.1, now(2, 0.2))
    assert not better(best, start, 0.2, now(2, 0.2)) and not better(best, start, None, now(2.5, 0.9))
    assert better(BestSection("source_valid_loss"), start, 2.0, now(1.9, 0))
    assert not better(best, start, None, {})
