"""Answers of a model: the same whatever shares the work or stops it, filtered, and in one file or none."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace

import pytest
import torch
import transformers

from megatron_ssu.cli import main
from megatron_ssu.config.checks.data import validate_generate
from megatron_ssu.config.schema import FilterSection, GenerateSection
from megatron_ssu.data.tokenizer import load_tokenizer
from megatron_ssu.errors import UserError
from megatron_ssu.generate import backends
from megatron_ssu.generate.answers import answer_share, begin, is_made, open_job, publish
from megatron_ssu.generate.filters import Answer, in_script, refused_by, repetition
from megatron_ssu.generate.prompts import read_prompts, turns_before_answer
from tests.models import make_model
from tests.unit.data_makers import TEMPLATE, make_hf_tokenizer

PROMPTS = [{"prompt": f"word {i} " * (i % 4 + 1)} for i in range(11)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model with a chat template whose answers are short."""
    folder = make_model("olmo2", tmp_path_factory.mktemp("model") / "hf", vocab_size=321, max_position_embeddings=96)
    make_hf_tokenizer(folder, template=TEMPLATE)
    return folder


def section(tmp_path, rows=PROMPTS, **changed):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keep = FilterSection(ends=False, max_repetition=1.0)
    return replace(
        GenerateSection(str(file), max_new_tokens=12, batch_size=4, backend="transformers", filter=keep), **changed
    )


def made(model, output, section, ranks=1):
    job = open_job(model, output, section)
    begin(job)
    for rank in range(ranks):
        answer_share(job, rank, ranks)
    publish(job)
    return [json.loads(line)["messages"] for line in output.read_text().splitlines()]


def test_greedy_answers_are_those_of_transformers_one_by_one(model, tmp_path):
    found = made(model, tmp_path / "a.jsonl", section(tmp_path))
    hf, plain = (
        transformers.AutoTokenizer.from_pretrained(model),
        transformers.AutoModelForCausalLM.from_pretrained(model),
    )
    assert len(found) == len(PROMPTS)
    for messages, row in zip(found, PROMPTS, strict=True):
        assert messages[0] == {"role": "user", "content": row["prompt"]}
        text = hf.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        ids = hf(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        output = plain.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=hf.eos_token_id, pad_token_id=0)
        answer = output[0, ids.shape[1] :].tolist()
        answer = answer[: answer.index(hf.eos_token_id)] if hf.eos_token_id in answer else answer
        assert messages[1] == {"role": "assistant", "content": hf.decode(answer)}


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_number_of_processes_changes_nothing(model, tmp_path, temperature):
    how = section(tmp_path, temperature=temperature, samples=9)
    one = made(model, tmp_path / "one.jsonl", how)
    torch.manual_seed(99)
    assert made(model, tmp_path / "three.jsonl", how, ranks=3) == one
    if temperature:
        assert made(model, tmp_path / "other.jsonl", replace(how, seed=5)) != one


def test_what_was_answered_before_a_stop_is_not_answered_again(model, tmp_path, monkeypatch):
    how = section(tmp_path, temperature=0.9)
    whole = made(model, tmp_path / "whole.jsonl", how)
    job = open_job(model, tmp_path / "stopped.jsonl", how)
    begin(job)
    answer, calls = backends.Transformers.answer, []

    def stops(self, batch, number):
        calls.append(number)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(self, batch, number)

    monkeypatch.setattr(backends.Transformers, "answer", stops)
    with pytest.raises(KeyboardInterrupt):
        answer_share(job, 0, 1)
    assert not job.output.exists()
    begin(job)
    answer_share(job, 0, 1)
    publish(job)
    assert calls == [0, 1, 2, 2]
    assert [json.loads(line)["messages"] for line in job.output.read_text().splitlines()] == whole
    assert not job.folder.exists() and is_made(job)


@pytest.mark.slow
def test_the_command_is_killed_and_goes_on(model, tmp_path):
    section(tmp_path, rows=PROMPTS * 20)
    command = [sys.executable, "-m", "megatron_ssu", "generate", str(model), str(tmp_path / "prompts.jsonl")]
    command += [
        "--max-new-tokens",
        "12",
        "--batch-size",
        "2",
        "--temperature",
        "0.8",
        "--unended",
        "--max-repetition",
        "1",
    ]

    def run(output, *more):
        return subprocess.run(
            [*command, "--output", str(output), *more], capture_output=True, text=True, env=environment
        )

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    quiet = run(tmp_path / "quiet.jsonl", "--processes", "2")
    assert quiet.returncode == 0 and "of 220 answers kept" in quiet.stdout, quiet.stderr
    killed, parts = tmp_path / "killed.jsonl", tmp_path / "killed.jsonl.parts"
    process = subprocess.Popen([*command, "--output", str(killed)], stdout=subprocess.DEVNULL, env=environment)
    while len(list(parts.glob("batch-*"))) < 5:
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not killed.exists() and len(list(parts.glob("batch-*"))) < 110
    again = run(killed)
    assert again.returncode == 0 and again.stderr == "", again.stderr
    assert killed.read_bytes() == (tmp_path / "quiet.jsonl").read_bytes()
    assert "nothing to do" in run(killed).stdout


def test_another_job_does_not_go_on_in_a_file(model, tmp_path):
    how, output = section(tmp_path), tmp_path / "a.jsonl"
    job = open_job(model, output, how)
    begin(job)
    with pytest.raises(UserError, match=r"a\.jsonl\.parts: was begun with another temperature \(0\.0, now 0\.5\)"):
        begin(open_job(model, output, replace(how, temperature=0.5)))
    answer_share(job, 0, 1)
    publish(job)
    with pytest.raises(UserError, match=r"a\.jsonl: exists already and was made with another prompts"):
        is_made(open_job(model, output, section(tmp_path, PROMPTS[:5])))
    (tmp_path / "b.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"b\.jsonl: exists already; name another file"):
        is_made(open_job(model, tmp_path / "b.jsonl", section(tmp_path)))


def test_filters_may_be_loosened_before_the_file_is_made(model, tmp_path):
    """What was answered stays; nothing is asked again."""
    output, strict = tmp_path / "a.jsonl", section(tmp_path, filter=FilterSection(min_tokens=99, ends=False))
    with pytest.raises(UserError, match="no answer passes the filters"):
        made(model, output, strict)
    job = open_job(model, output, section(tmp_path))
    times = [job.part(number).stat().st_mtime_ns for number in range(3)]
    begin(job)
    answer_share(job, 0, 1)
    assert times == [job.part(number).stat().st_mtime_ns for number in range(3)]
    assert publish(job)["kept"] == len(PROMPTS)
    with pytest.raises(UserError, match="was made with another filter"):
        is_made(open_job(model, output, section(tmp_path, filter=FilterSection(min_tokens=2))))


def test_tools_are_shown_to_the_model_and_kept_beside_its_answer(model, tmp_path):
    shows = tmp_path / "shows"
    shutil.copytree(model, shows)
    make_hf_tokenizer(shows, template="{% if tools %}{{ tools | tojson }}{% endif %}" + TEMPLATE)
    tools = [{"name": "search"}]
    how = section(tmp_path, [{"prompt": "q", "tools": tools}, {"prompt": "q"}])
    with_tools, without = open_job(shows, tmp_path / "a.jsonl", how).prompts
    hf = transformers.AutoTokenizer.from_pretrained(shows)
    rendered = hf.apply_chat_template(with_tools.messages, tools=tools, tokenize=False, add_generation_prompt=True)
    assert with_tools.ids == hf(rendered, add_special_tokens=False)["input_ids"] != without.ids
    made(shows, tmp_path / "a.jsonl", how)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert rows[0]["tools"] == tools and "tools" not in rows[1]
    with pytest.raises(UserError, match=r"prompts\.jsonl:1: 'tools' is not a list"):
        open_job(shows, tmp_path / "b.jsonl", section(tmp_path, [{"prompt": "q", "tools": "search"}]))


ANSWER = Answer("A fine answer.", list(range(10)), True)


@pytest.mark.parametrize(
    ("answer", "keep", "refused"),
    [
        (ANSWER, {}, None),
        (replace(ANSWER, text="  "), {}, "empty"),
        (replace(ANSWER, ended=False), {}, "ends"),
        (replace(ANSWER, ended=False), {"ends": False}, None),
        (ANSWER, {"min_tokens": 11}, "min_tokens"),
        (ANSWER, {"max_tokens": 9}, "max_tokens"),
        (replace(ANSWER, ids=[1, 2] * 20), {}, "max_repetition"),
        (replace(ANSWER, ids=[1, 2] * 20), {"max_repetition": 0.95}, None),
        (ANSWER, {"language": "latin"}, None),
        (ANSWER, {"language": "ethiopic"}, "language"),
        (replace(ANSWER, text="ሰላም ለሁሉም a"), {"language": "ethiopic"}, None),
    ],
)
def test_filters(answer, keep, refused):
    assert refused_by(answer, FilterSection(**keep)) == refused


def test_repetition_and_scripts():
    assert repetition([1, 2, 3]) == 0 and repetition([1] * 8) == 0.8 and repetition(list(range(50))) == 0
    assert in_script("1, 2!", "latin") and not in_script("ab ሰላም", "latin")


def test_a_language_identifier_is_asked(monkeypatch):
    monkeypatch.setitem(sys.modules, "langid", types.SimpleNamespace(classify=lambda text: ("en", -1.0)))
    keep = FilterSection(language="en", identifier="langid")
    assert refused_by(ANSWER, keep) is None and refused_by(ANSWER, replace(keep, language="am")) == "language"


def test_what_filters_refuse_is_counted(model, tmp_path):
    job = open_job(model, tmp_path / "a.jsonl", section(tmp_path))
    begin(job)
    answer_share(job, 0, 1)
    answers = json.loads(job.part(0).read_text())
    answers[0]["text"], answers[1]["ids"] = "", [1] * 30
    job.part(0).write_text(json.dumps(answers))
    strict = replace(job, section=replace(job.section, filter=FilterSection(ends=False, max_repetition=0.9)))
    counts = publish(strict)
    assert counts["empty"] == counts["max_repetition"] == 1 and counts["kept"] == len(PROMPTS) - 2
    metadata = json.loads((tmp_path / "a.jsonl.json").read_text())
    assert metadata["answers"] == counts and metadata["versions"]["transformers"] == transformers.__version__


def test_nothing_left_is_an_error(model, tmp_path):
    how = section(tmp_path, filter=FilterSection(min_tokens=99, ends=False))
    with pytest.raises(UserError, match=r"no answer passes the filters \(min_tokens 11\)"):
        made(model, tmp_path / "a.jsonl", how)
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize(
    ("value", "turns"),
    [
        ({"messages": [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]}, ["s", "u"]),
        ({"conversations": [{"from": "human", "value": "q"}]}, ["q"]),
        ({"instruction": "do", "input": "this", "output": "done"}, ["do\n\nthis"]),
        ({"instruction": "do"}, ["do"]),
        ({"prompt": "q", "system": "s"}, ["s", "q"]),
        ({"text": "q"}, ["q"]),
    ],
)  # fmt: skip
def test_rows_are_prompts(value, turns):
    assert [turn["content"] for turn in turns_before_answer(value)] == turns


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "x"}, {"promt": "y"}], r"prompts\.jsonl:2: none of 'messages'"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], r"prompts\.jsonl:1: no turn of the user to answer"),
        ([{"prompt": "x" * 200}], r"prompts\.jsonl:1: the prompt has \d+ tokens, which with 12 new ones are more .* 96 pos"),
        ([], r"prompts\.jsonl: no prompts in it"),
    ],
)  # fmt: skip
def test_bad_prompts_are_named(model, tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        open_job(model, tmp_path / "a.jsonl", section(tmp_path, rows))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl"]


def test_prompts_that_are_too_long_can_be_dropped(model, tmp_path):
    how = section(tmp_path, [{"prompt": "x" * 200}, {"prompt": "y"}], too_long="drop")
    prompts, dropped = read_prompts(how.prompts, load_tokenizer(model), how, 96)
    assert [prompt.row for prompt in prompts] == [2] and dropped == 1
    with pytest.raises(UserError, match=r"all 1 prompts are too long"):
        open_job(model, tmp_path / "a.jsonl", section(tmp_path, [{"prompt": "x" * 200}], too_long="drop"))


def test_a_model_without_a_template_cannot_be_asked(tmp_path, model):
    plain = tmp_path / "plain"
    shutil.copytree(model, plain)
    make_hf_tokenizer(plain, template=None)
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UserError, match="no chat template, so nothing can be asked"):
        open_job(plain, tmp_path / "a.jsonl", section(tmp_path))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--processes", "0"], "--processes: must be at least 1"),
        (["--batch-size", "0"], "generate.batch_size: must be at least 1"),
        (["--top-p", "0"], "generate.top_p: must be above 0"),
        (["--max-repetition", "2"], "generate.filter.max_repetition"),
        (["--backend", "vllm"], "needs vllm, which is not installed"),
        (["--language", "en", "--identifier", "langid"], "needs langid, which is not installed"),
        (["--language", "en"], "generate.filter.language: must be a script of Unicode such as latin"),
    ],
)
def test_bad_options_are_one_line(model, tmp_path, capsys, more, words):
    section(tmp_path)
    with pytest.raises(SystemExit) as status:
        main(["generate", str(model), str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "a.jsonl"), *more])
    captured = capsys.readouterr()
    assert status.value.code == 2 and words in captured.err and captured.err.count("\n") == 1


def test_vllm_is_asked_with_a_seed_per_prompt(model, tmp_path, monkeypatch):
    """Against a stand-in: the calls of vLLM's LLM and SamplingParams."""
    asked = []

    class LLM:
        def __init__(self, **options):
            asked.append(options)

        def generate(self, prompts, options, use_tqdm):
            asked.extend(zip(prompts, options, strict=True))
            ended = [
                types.SimpleNamespace(token_ids=[5, 6, end], finish_reason="stop")
                for end in options[0]["stop_token_ids"]
            ]
            ended.append(types.SimpleNamespace(token_ids=[5, 6, end_of_turn], finish_reason="length"))
            return [types.SimpleNamespace(outputs=[ended[i % 3]]) for i in range(len(prompts))]

    fake = types.SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: options)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    how = section(tmp_path, backend="vllm", temperature=0.7)
    hf = transformers.AutoTokenizer.from_pretrained(model)
    end_of_turn = hf.convert_tokens_to_ids("<|user|>")  # as <|eot_id|> of Llama 3: of generation_config.json alone
    shutil.copytree(model, tmp_path / "ends")
    config = tmp_path / "ends" / "generation_config.json"
    config.write_text(json.dumps({"eos_token_id": [hf.eos_token_id, end_of_turn]}))
    model = tmp_path / "ends"
    found = made(model, tmp_path / "a.jsonl", how)
    texts = [messages[1]["content"] for messages in found]
    assert set(texts[0::4] + texts[1::4]) == {hf.decode([5, 6])} and set(texts[2::4]) == {
        hf.decode([5, 6, end_of_turn])
    }
    assert asked[1][1]["stop_token_ids"] == sorted({hf.eos_token_id, end_of_turn})
    assert asked[0]["model"] == str(model) and len(asked) == 1 + len(PROMPTS)
    assert len({options["seed"] for _, options in asked[1:]}) == len(PROMPTS)
    assert asked[1][1]["temperature"] == 0.7 and asked[1][1]["max_tokens"] == 12


def test_a_language_code_must_be_known(tmp_path, monkeypatch):
    known = types.SimpleNamespace(rank=lambda text: [("en", -1.0), ("am", -2.0)], __spec__=1)
    monkeypatch.setitem(sys.modules, "langid", known)
    how = section(tmp_path, filter=FilterSection(language="english", identifier="langid"))
    with pytest.raises(
        UserError, match=r"g\.filter\.language: must be one of langid's 2 codes, such as en, got 'english'"
    ):
        validate_generate(how, "g")
    validate_generate(replace(how, filter=replace(how.filter, language="am")), "g")
