from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from megatron_ssu.data.calibration import load_calibration
from megatron_ssu.data.tokenizer import load_tokenizer
from megatron_ssu.errors import UserError
from tests.unit.data_makers import make_hf_tokenizer, make_sentencepiece

REAL = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_tokenizer(tmp_path_factory.mktemp("model"))


def write(path: Path, *values: Any) -> Path:
    path.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values), encoding="utf-8")
    return path


def chat(user: str, assistant: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def packed(model: Path, chats: list[list[dict[str, str]]], length: int) -> tuple[list[int], int]:
    """Tokens of the concatenated chats, and the number of rows, by transformers alone."""
    hf = AutoTokenizer.from_pretrained(str(model))
    ids: list[int] = []
    for messages in chats:
        text = hf.apply_chat_template(messages, tokenize=False)
        ids += hf(text, add_special_tokens=False)["input_ids"]
    return ids, (len(ids) + length - 1) // length


def test_packing_equals_transformers(tmp_path: Path, model: Path) -> None:
    chats = [chat(f"Question {i}?", "Answer " * (i % 7 + 1)) for i in range(40)]
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    write(files[0], *[{"messages": c} for c in chats[:15]], "")
    write(files[1], *[{"messages": c} for c in chats[15:]])
    got = load_calibration(files, load_tokenizer(model), samples=25, sequence_length=64, seed=3)
    chosen = sorted(random.Random(3).sample(range(40), 25))
    ids, rows = packed(model, [chats[i] for i in chosen], 64)
    assert got.tokens.shape == got.mask.shape == (rows, 64)
    assert (got.tokens.dtype, got.mask.dtype) == (torch.int64, torch.bool)
    assert got.tokens.flatten()[: len(ids)].tolist() == ids
    assert got.mask.flatten().tolist() == [True] * len(ids) + [False] * (rows * 64 - len(ids))
    assert (got.n_samples, got.note) == (25, None)


def test_seed_and_content_decide_the_digest(tmp_path: Path, model: Path) -> None:
    file = write(tmp_path / "a.jsonl", *[{"text": f"sample {i}"} for i in range(30)])
    tokenizer = load_tokenizer(model)

    def digest(**changed: int) -> str:
        return load_calibration(file, tokenizer, **{"samples": 10, "sequence_length": 16, "seed": 1, **changed}).digest

    assert digest() == digest()
    assert len({digest(), digest(seed=2), digest(samples=11), digest(sequence_length=17)}) == 4


def test_all_shapes_of_a_sample_render_alike(tmp_path: Path, model: Path) -> None:
    want = chat("Say it.\n\nNow", "It.")
    file = write(
        tmp_path / "a.jsonl",
        {"messages": want},
        {"conversations": [{"from": "human", "value": "Say it.\n\nNow"}, {"from": "gpt", "value": "It."}]},
        {"instruction": "Say it.", "input": "Now", "output": "It."},
        {"instruction": "Say it.\n\nNow", "input": "", "output": "It."},
        {"text": "<|end|><|user|>Say it.\n\nNow<|assistant|>It.<|end|>"},
    )
    got = load_calibration(file, load_tokenizer(model), samples=5, sequence_length=32, seed=0)
    ids, _ = packed(model, [want] * 5, 32)
    assert got.tokens[got.mask].tolist() == ids


def test_fewer_samples_than_asked_are_all_used_and_said(tmp_path: Path, model: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    got = load_calibration(file, load_tokenizer(model), samples=500, sequence_length=8, seed=0)
    assert got.n_samples == 2
    assert got.note is not None and "2 calibration samples there, 500 asked" in got.note and "\n" not in got.note


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"messages": [{"role": "ghost", "content": "x"}]}, "chat template cannot render it .*role ghost is unknown"),
        ({"messages": [{"role": "user", "content": None}]}, "chat template cannot render it"),
        ({"messages": []}, "'messages' is not a list"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\] has no 'role'"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, r"conversations\[0\]: 'from' is 'robot'"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, r"conversations\[0\] has no 'value'"),
        ({"instruction": "x"}, "without 'output'"),
        ({"instruction": 3, "output": "x"}, "'instruction' is not a string"),
        ({"text": 3}, "'text' is not a string"),
        ({"text": ""}, "the sample is empty"),
        ({"question": "x"}, "none of 'messages'.*keys: 'question'"),
        ({"prompt": "x"}, "'completion' is not a string"),
        ('{"text": "\\ud800"}', "surrogate"),
        ('{"text": ', "broken JSON"),
        ("[]", "not a JSON object"),
    ],
)
def test_bad_samples_are_named(tmp_path: Path, model: Path, value: Any, message: str) -> None:
    file = write(tmp_path / "a.jsonl", {"text": "fine"}, "", value)
    with pytest.raises(UserError, match=rf"^{file}:3: .*{message}") as error:
        load_calibration(file, load_tokenizer(model), samples=2, sequence_length=8, seed=0)
    assert "\n" not in str(error.value)


def test_nothing_to_calibrate_on(tmp_path: Path, model: Path) -> None:
    tokenizer, empty = load_tokenizer(model), write(tmp_path / "a.jsonl", "")
    for paths in (empty, []):
        with pytest.raises(UserError, match="no calibration samples"):
            load_calibration(paths, tokenizer, samples=2, sequence_length=8, seed=0)
    for bad in ({"samples": 0}, {"sequence_length": 0}):
        with pytest.raises(UserError, match="at least 1"):
            load_calibration(empty, tokenizer, **{"samples": 2, "sequence_length": 8, "seed": 0, **bad})


def test_chat_without_template(tmp_path: Path) -> None:
    folder = make_sentencepiece(tmp_path)
    file = write(tmp_path / "a.jsonl", {"messages": chat("a", "b")})
    with pytest.raises(UserError, match=rf"{file}:1: .*{folder} has no chat template"):
        load_calibration(file, load_tokenizer(folder), samples=1, sequence_length=8, seed=0)


@pytest.mark.skipif(not REAL.is_dir(), reason="shared/data is not there")
def test_real_calibration_data() -> None:
    tokenizer = load_tokenizer(REAL / "olmo2-tiny-source")
    assert tokenizer.special_token_ids_of_chat_template() == [0, 1, 2]
    got = load_calibration(REAL / "calibration.jsonl", tokenizer, samples=100, sequence_length=512, seed=1234)
    lines = (REAL / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    chosen = sorted(random.Random(1234).sample(range(len(lines)), 100))
    ids, _ = packed(REAL / "olmo2-tiny-source", [json.loads(lines[i])["messages"] for i in chosen], 512)
    assert got.tokens[got.mask].tolist() == ids
