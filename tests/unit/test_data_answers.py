"""Chats with loss on answers alone: against templates that mark answers themselves, and against single tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from megatron_ssu.config.sources import Reading
from megatron_ssu.data.chat import encode_answer, encode_training_chat
from megatron_ssu.data.indexed import MaskReader, check_prefix, content_digest, loss_path, prepared_prefix
from megatron_ssu.data.jsonl import BadLine
from megatron_ssu.data.prepare import prepare
from megatron_ssu.data.tokenizer import load_tokenizer
from megatron_ssu.errors import UserError
from tests.unit.data_makers import TEMPLATE, make_hf_tokenizer, make_sentencepiece

CHATML = (
    "{% if tools %}{{ '<|system|>' + (tools | tojson) + '<|end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
    "{% if m['role'] == 'assistant' %}GEN{{ m['content'] + '<|end|>' }}END{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MARKED = CHATML.replace("GEN", "{% generation %}").replace("END", "{% endgeneration %}")
PLAIN = CHATML.replace("GEN", "").replace("END", "")
FORGETFUL = PLAIN.replace("m['content'] + '<|end|>' }}{{", "(m['content'] if loop.last else '') + '<|end|>' }}{{")
CHATS = [
    [("user", "Columns?"), ("assistant", "The others learn.")],
    [
        ("system", "Be short."),
        ("user", "ሰላም"),
        ("assistant", "ሰላም ለሁሉም"),
        ("user", "and?"),
        ("assistant", "A line\nbreak."),
    ],
    [("user", "quick"), ("assistant", "")],
    [
        ("user", "<|end|> in a text"),
        ("assistant", "brown  "),
        ("user", "fox"),
        ("assistant", "jumps"),
        ("user", "over?"),
    ],
]


def messages(chat):
    return [{"role": role, "content": content} for role, content in chat]


def tokenizer_of(folder, template):
    return load_tokenizer(make_hf_tokenizer(folder, template=template))


@pytest.mark.parametrize("tools", [None, [{"name": "search"}]])
@pytest.mark.parametrize("chat", CHATS)
def test_spans_are_those_that_a_marking_template_gives(tmp_path, chat, tools):
    plain, marked = tokenizer_of(tmp_path / "plain", PLAIN), tokenizer_of(tmp_path / "marked", MARKED)
    assert (plain.marks_answers, marked.marks_answers) == (False, True)
    value = {"messages": messages(chat)} | ({"tools": tools} if tools else {})
    ids, mask = encode_training_chat(value, plain, answers=True)
    other_ids, other_mask = encode_training_chat(value, marked, answers=True)
    hf = AutoTokenizer.from_pretrained(tmp_path / "marked")
    expected = hf.apply_chat_template(messages(chat), tools=tools, return_dict=True, return_assistant_tokens_mask=True)
    assert ids == other_ids == expected["input_ids"]
    assert list(other_mask) == expected["assistant_masks"]
    assert mask == other_mask
    assert encode_training_chat(value, plain, answers=False) == (ids, None)


def test_the_answer_and_the_end_of_its_turn_have_loss(tmp_path):
    tokenizer = tokenizer_of(tmp_path, TEMPLATE)
    ids, mask = encode_training_chat({"messages": messages(CHATS[1])}, tokenizer, answers=True)
    kept = [i for i, yes in zip(ids, mask, strict=True) if yes]
    assert tokenizer.decode(kept) == "ሰላም ለሁሉም<|end|>A line\nbreak.<|end|>"


def test_text_as_an_answer(tmp_path):
    tokenizer = tokenizer_of(tmp_path, PLAIN)
    ids, mask = encode_answer("  a <|user|> text ", "Go on.", tokenizer)
    assert tokenizer.decode(ids) == "<|user|>\nGo on.<|end|>\n<|assistant|>\na <|user|> text<|end|>"
    assert tokenizer.decode([i for i, yes in zip(ids, mask, strict=True) if yes]) == "a <|user|> text<|end|>"
    special = tokenizer.encode_rendered("<|user|>")[0]
    assert ids.count(special) == 1, "letters of a special token in a text stay letters"


@pytest.mark.parametrize(
    ("template", "value", "message"),
    [
        (PLAIN, {"messages": messages([("user", "x")])}, "no turn of the assistant in it, and data.loss_on is answers"),
        (
            FORGETFUL,
            {"messages": messages(CHATS[3])},
            "cannot mark answers: .* answer 2 .*generation.*data.loss_on: all",
        ),
        (None, {"messages": messages(CHATS[0])}, "no chat template"),
        (PLAIN, {"messages": messages(CHATS[0]), "tools": "search"}, "'tools' is not a list"),
    ],
)
def test_what_cannot_be_marked_is_refused(tmp_path, template, value, message):
    with pytest.raises(BadLine, match=message):
        encode_training_chat(value, tokenizer_of(tmp_path, template), answers=True)


@pytest.mark.parametrize("text", ["", "  \n\t "])
def test_blanks_are_wrapped_in_nothing(tmp_path, text):
    assert encode_answer(text, "Go on.", tokenizer_of(tmp_path, PLAIN)) == ([], b"")


def test_text_cannot_be_wrapped_without_a_template_that_keeps_it(tmp_path):
    with pytest.raises(BadLine, match="no chat template"):
        encode_answer("x", "", load_tokenizer(make_sentencepiece(tmp_path)))
    shout = PLAIN.replace("{{ m['content'] + '<|end|>' }}", "{{ m['content'] | upper + '<|end|>' }}")
    with pytest.raises(BadLine, match=r"does not write an answer as it stands"):
        encode_answer("quiet", "", tokenizer_of(tmp_path / "shout", shout))


def prepared(tmp_path: Path, rows: list[dict], reading: Reading, name: str = "out"):
    model = tmp_path / "model"
    if not model.exists():
        make_hf_tokenizer(model, template=PLAIN)
    file = tmp_path / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare([file], tmp_path / name, model, reading=reading, workers=1)
    return check_prefix(tmp_path / name, tokenizer=load_tokenizer(model))


def test_masks_lie_beside_the_tokens(tmp_path):
    rows = [{"messages": messages(chat)} for chat in CHATS] + [{"text": "plain"}, {"prompt": "a", "completion": "b"}]
    info = prepared(tmp_path, rows, Reading(loss_on="answers"))
    tokenizer = load_tokenizer(tmp_path / "model")
    assert info.masked and loss_path(info.prefix).stat().st_size == info.tokens
    reader, data, at = MaskReader(info), np.fromfile(f"{info.prefix}.bin", np.uint16), 0
    for number, row in enumerate(rows):
        count = int(info.lengths[number])
        mask = reader.get(number)
        assert (reader.get(number, 1, 2) == mask[1:3]).all()
        if "text" in row:
            assert mask.all()
        else:
            ids, expected = encode_training_chat(row, tokenizer, answers=True)
            assert data[at : at + len(ids)].tolist() == ids and bytes(mask[: len(ids)]) == expected
            assert mask[len(ids) :].all(), "an end that was added is to be learnt"
        at += count


def test_without_masks_nothing_lies_there(tmp_path):
    info = prepared(tmp_path, [{"messages": messages(CHATS[0])}], Reading())
    assert not info.masked and not loss_path(info.prefix).exists()


def test_a_mask_that_is_gone_or_cut_is_named(tmp_path):
    info = prepared(tmp_path, [{"messages": messages(CHATS[0])}], Reading(loss_on="answers"))
    file = loss_path(info.prefix)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"out\.loss: \d+ bytes long, and must have a byte for each of \d+ tokens"):
        check_prefix(info.prefix)
    file.unlink()
    with pytest.raises(UserError, match=r"out\.loss: missing"):
        check_prefix(info.prefix)


def test_how_rows_are_read_is_part_of_the_name_and_of_the_digest(tmp_path):
    rows = [{"messages": messages(CHATS[0])}]
    names = ("all", "answers")
    infos = [prepared(tmp_path, rows, Reading(loss_on=how), how) for how in names]
    assert content_digest(infos[0].prefix) != content_digest(infos[1].prefix)
    file = tmp_path / "all.jsonl"
    readings = [
        Reading(),
        Reading(loss_on="answers"),
        Reading(wrap="answer"),
        Reading(wrap="answer", wrap_prompt="x"),
        Reading(columns=(("text", "body"),)),
        Reading(split="test"),
    ]
    assert len({prepared_prefix(tmp_path, file, "d", reading) for reading in readings}) == len(readings)
