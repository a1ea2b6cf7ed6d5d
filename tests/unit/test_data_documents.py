"""How documents begin and end, and what plain text cannot become: against transformers' own encoding."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import AddedToken
from transformers import AutoTokenizer

from megatron_ssu.data.indexed import check_prefix, content_digest, prepared_prefix
from megatron_ssu.data.prepare import prepare
from megatron_ssu.data.tokenizer import load_tokenizer
from megatron_ssu.errors import UserError
from tests.unit.data_makers import TEXTS, make_hf_tokenizer, make_instruct_tokenizer, make_sentencepiece, write_jsonl

DOCUMENT_ENDS = {"llama-3": "<|end_of_text|>", "qwen": "<|endoftext|>", "olmo-2": "<|endoftext|>", "llama-2": "</s>"}
CHAT = [{"role": "user", "content": "Now?"}, {"role": "assistant", "content": "Yes."}]


@pytest.mark.parametrize("form", DOCUMENT_ENDS)
def test_documents_begin_as_transformers_begins_them_and_end_with_the_end_of_text(form: str, tmp_path: Path) -> None:
    model = make_instruct_tokenizer(tmp_path / "model", form)
    hf = AutoTokenizer.from_pretrained(str(model))
    end = hf.convert_tokens_to_ids(DOCUMENT_ENDS[form])
    lines = write_jsonl(tmp_path / "text.jsonl", TEXTS)
    with lines.open("a") as file:
        file.write(json.dumps({"messages": CHAT}) + "\n")
    prepare([lines], tmp_path / "out", model)
    documents = [d.tolist() for d in IndexedDataset(str(tmp_path / "out"))]
    assert documents[:-1] == [[*hf(t, add_special_tokens=True)["input_ids"], end] for t in TEXTS]
    assert documents[-1] == hf.apply_chat_template(CHAT, tokenize=True, return_dict=False), "a chat is its template's"


def test_a_directory_with_a_sentencepiece_model_begins_with_its_bos(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_sentencepiece(tmp_path))
    assert (tokenizer.document_begin, tokenizer.document_end) == ([1], tokenizer.eos_id)


def test_the_run_file_may_choose_the_end(tmp_path: Path) -> None:
    model = make_instruct_tokenizer(tmp_path / "model", "llama-3")
    tokenizer = load_tokenizer(model, document_end="<|eot_id|>")
    assert tokenizer.document_end == tokenizer.eos_id
    assert tokenizer.digest != load_tokenizer(model).digest
    with pytest.raises(UserError, match=r"data\.document_end: must be a token of .*model, got '<\|eod\|>'"):
        load_tokenizer(model, document_end="<|eod|>")
    with pytest.raises(UserError, match=r"data\.document_end: must be a token of .*, got 'x y'"):
        load_tokenizer(make_sentencepiece(tmp_path), document_end="x y")


def test_another_begin_or_end_makes_other_datasets(tmp_path: Path) -> None:
    """Datasets with other begins or ends are neither taken for these nor resumed with."""
    model = make_instruct_tokenizer(tmp_path / "model", "llama-3")
    text = write_jsonl(tmp_path / "text.jsonl", TEXTS)
    prefixes, contents = set(), set()
    for number, end in enumerate((None, "<|eot_id|>")):
        tokenizer = load_tokenizer(model, document_end=end)
        prefixes.add(prepared_prefix(tmp_path, text, tokenizer.digest))
        prepare([text], tmp_path / f"out{number}", model, document_end=end)
        contents.add(content_digest(tmp_path / f"out{number}"))
    definition = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**definition, "eos_token": "<|end_of_text|>"}))
    prefixes.add(prepared_prefix(tmp_path, text, load_tokenizer(model).digest))
    assert len(prefixes) == 3 and len(contents) == 2


def test_another_end_is_noticed_without_an_eos_token(tmp_path: Path) -> None:
    model = make_instruct_tokenizer(tmp_path / "model", "qwen")
    definition = json.loads((model / "tokenizer_config.json").read_text())
    del definition["eos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(definition))
    assert load_tokenizer(model).eos_id is None
    text, contents = write_jsonl(tmp_path / "text.jsonl", TEXTS), set()
    for end in (None, "0"):
        prepare([text], tmp_path / "out", model, document_end=end, overwrite=True)
        contents.add(content_digest(tmp_path / "out"))
    assert json.loads((tmp_path / "out.json").read_text())["eos"] is None
    assert len(contents) == 2


@pytest.mark.parametrize("form", ["hf", "sentencepiece"])
def test_a_dataset_with_another_end_is_refused_by_the_key(form: str, tmp_path: Path) -> None:
    if form == "hf":
        model, ends = make_instruct_tokenizer(tmp_path / "model", "llama-3"), ("<|end_of_text|>", "<|eot_id|>")
    else:
        model, ends = make_sentencepiece(tmp_path), ("</s>", "<s>")
    prepare([write_jsonl(tmp_path / "text.jsonl", TEXTS)], tmp_path / "out", model)
    check_prefix(tmp_path / "out", tokenizer=load_tokenizer(model, document_end=ends[0]))
    message = f"out.json: data.document_end: its documents end with {ends[0]!r}, those of this run with {ends[1]!r}"
    with pytest.raises(UserError, match=re.escape(message)):
        check_prefix(tmp_path / "out", tokenizer=load_tokenizer(model, document_end=ends[1]))


def test_plain_text_makes_no_token_that_the_template_writes(tmp_path: Path) -> None:
    """<|tool|> is an added token that is not marked special; its row is frozen like the special tokens'."""
    model = make_hf_tokenizer(tmp_path / "model")
    hf = AutoTokenizer.from_pretrained(str(model))
    hf.add_tokens([AddedToken("    ", special=False, normalized=False)])  # layout: stays one token
    hf.save_pretrained(str(model))
    tokenizer = load_tokenizer(model)
    tool, blanks = hf.convert_tokens_to_ids(["<|tool|>", "    "])
    assert tokenizer.marks == [tool]
    text = "a <|tool|> b\n    c <|end|>"
    ids = tokenizer.encode(text)
    assert tool not in ids and hf.eos_token_id not in ids and ids.count(blanks) == 1
    assert tokenizer.decode(ids) == text
    assert tool in tokenizer.encode_rendered(text)
    for other in TEXTS:
        assert tokenizer.encode(other) == hf(other, add_special_tokens=False)["input_ids"]
    names = {prepared_prefix(tmp_path, write_jsonl(tmp_path / "t.jsonl", TEXTS), "d", marks=m) for m in ([], [320])}
    assert len(names) == 2


def test_a_template_that_renders_nothing_keeps_its_tokens_out_of_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_hf_tokenizer(tmp_path, template="{{ raise_exception('no') }}<|tool|>"))
    assert tokenizer.marks == [320] and 320 not in tokenizer.encode("a <|tool|>")
