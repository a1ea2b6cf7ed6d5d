"""Tiny tokenizers and text files for the tests of the data package."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import zstandard
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "In the beginning was the word, and the word was short.",
    "ሰላም ለሁሉም ይሁን።",
    "Columns that matter stay as they were; the others learn.",
    "A line\nbreak and a\ttab.",
    "Tokens, tokens, tokens!",
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'tool' %}{{ '<|tool|>' + m['content'] }}"
    "{% elif m['role'] in ('user', 'system') %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|assistant|>' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('role ' + m['role'] + '\n is unknown') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIALS = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>"]


def make_hf_tokenizer(folder: Path, *, vocab_size: int = 320, template: str | None = TEMPLATE) -> Path:
    """A byte-level BPE tokenizer with special tokens, an added token that is not special, and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("<|tool|>", special=False, normalized=False)])
    hf = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|end|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=template,
    )
    hf.save_pretrained(str(folder))
    return folder


def make_sentencepiece(folder: Path) -> Path:
    """A directory with nothing but a SentencePiece `tokenizer.model`."""
    (folder / "sp").mkdir(parents=True)
    text = folder / "sp.txt"
    text.write_text("\n".join(t.replace("\n", " ").replace("\t", " ") for t in TEXTS * 5), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "sp" / "tokenizer"),
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "sp" / "tokenizer.vocab").unlink()
    return folder / "sp"


def write_jsonl(path: Path, texts: Sequence[str], *, text_key: str = "text") -> Path:
    """One document a line, compressed as the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps({text_key: t}) + "\n" for t in texts).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = zstandard.ZstdCompressor(write_checksum=True).compress(content)  # as the zstd command does
    path.write_bytes(content)
    return path


def make_instruct_tokenizer(folder: Path, form: str) -> Path:
    """A tokenizer with the special tokens of a family of instruct models: llama-3, qwen, olmo-2, llama-2.

    llama-3 and llama-2 begin a text with bos; the eos_token of llama-3 and qwen ends a chat turn, not a document.
    """
    names, bos, eos, first = {
        "llama-3": (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], "<|begin_of_text|>", "<|eot_id|>", True),
        "qwen": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>", False),
        "olmo-2": (["<|endoftext|>", "<|user|>"], "<|endoftext|>", "<|endoftext|>", False),
        "llama-2": (["<unk>", "<s>", "</s>"], "<s>", "</s>", True),
    }[form]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if first:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    hf = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        chat_template=("{{ bos_token }}" if bos else "") + template,
    )
    hf.save_pretrained(str(folder))
    return folder
