"""The model's own tokenizer behind one small class: Hugging Face files, or a SentencePiece `tokenizer.model` alone."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_ssu.errors import UserError

# Any of these holds a vocabulary; without one transformers may build an empty tokenizer and say nothing.
_HF_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_HF_FILES = (*_HF_VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
_SENTENCEPIECE = "tokenizer.model"

Message = Mapping[str, Any]


def load_tokenizer(model_path: str | Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer in the directory `model_path`; nothing is fetched from elsewhere.

    Raises UserError when the directory or its tokenizer files are missing or damaged.
    """
    path = Path(model_path)
    if not path.is_dir():
        raise UserError(f"{path}: not a directory; model.path names a Hugging Face directory with a tokenizer")
    has_config = (path / "tokenizer_config.json").is_file()
    if any((path / name).is_file() for name in _HF_VOCABULARIES) or (
        has_config and ((path / _SENTENCEPIECE).is_file() or trust_remote_code)
    ):
        return _HuggingFaceTokenizer(path, trust_remote_code)
    if (path / _SENTENCEPIECE).is_file():
        return _SentencePieceTokenizer(path)
    raise UserError(f"{path}: no tokenizer in it (looked for {', '.join(_HF_VOCABULARIES)}, {_SENTENCEPIECE})")


class Tokenizer(ABC):
    """Text to token ids and back.

    `encode` takes text as text: it adds nothing, and the letters of a special token in a document do not become that
    token. `encode_rendered` is for rendered chats, where they do.
    """

    path: Path
    vocab_size: int  # every id is below it, those of added tokens too
    eos_id: int | None
    bos_id: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without special tokens."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts, faster than one by one."""

    @abstractmethod
    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a rendered chat: the special tokens written in it are recognised, none are added."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens included."""

    @property
    def document_end(self) -> int:
        """The id that ends a document. Raises UserError when the tokenizer has no end token."""
        if self.eos_id is None:
            raise UserError(
                f"{self.path}: the tokenizer has no eos_token, which ends documents; name one in its config"
            )
        return self.eos_id

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat_template)

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """Jinja source, or several by name; None without one."""
        return None

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """`messages` in the model's chat format. Raises UserError where it has none; its errors pass through."""
        raise UserError(f"{self.path}: the tokenizer has no chat template, so chats cannot be rendered")

    def special_token_ids_of_chat_template(self) -> list[int]:
        """Sorted ids of the special and added tokens that the chat template writes; none without a template."""
        return []

    @cached_property
    def digest(self) -> str:
        """sha256 over what decides how text is tokenized: vocabulary files and end token, not the chat template."""
        digest = hashlib.sha256(f"eos={self.eos_id}\n".encode())
        for file in self._digest_files():
            content = file.read_bytes()
            digest.update(f"{file.name}:{len(content)}\n".encode())
            digest.update(content)
        return digest.hexdigest()

    @abstractmethod
    def _digest_files(self) -> list[Path]: ...


class _HuggingFaceTokenizer(Tokenizer):
    def __init__(self, path: Path, trust_remote_code: bool) -> None:
        from transformers import AutoTokenizer  # late: it takes seconds, and SentencePiece needs none of it

        self.path = path
        try:
            self._hf = AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=trust_remote_code
            )
            vocabulary = self._hf.get_vocab()
        except Exception as error:  # transformers and tokenizers raise every kind, bare Exception included
            if "trust_remote_code" in str(error):
                hint = "it brings code of its own; model.trust_remote_code=true lets it run"
            else:
                _check_config(path)
                hint = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"{path}: the tokenizer cannot be loaded ({hint})") from error
        if not vocabulary:
            raise UserError(f"{path}: the tokenizer has an empty vocabulary")
        self.vocab_size = max(len(self._hf), max(vocabulary.values()) + 1)
        self.eos_id = self._hf.eos_token_id
        self.bos_id = self._hf.bos_token_id

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._hf(
            list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        return encoded["input_ids"]

    def encode_rendered(self, text: str) -> list[int]:
        return self._hf(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._hf.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        return self._hf.chat_template

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        if not self.has_chat_template:
            return super().render_chat(messages)
        conversation = [dict(m) for m in messages]
        text = self._hf.apply_chat_template(conversation, tokenize=False, add_generation_prompt=add_generation_prompt)
        return str(text)

    def special_token_ids_of_chat_template(self) -> list[int]:
        """Sorted ids of special and added tokens in sample renderings or written literally in the template.

        Raises UserError when the template renders not even a user's and an assistant's turn.
        """
        if not self.has_chat_template:
            return []
        special = set(self._hf.all_special_ids)
        added = {i: token.content for i, token in self._hf.added_tokens_decoder.items()}
        special |= {i for i, token in self._hf.added_tokens_decoder.items() if token.special}
        # Runs of blanks are added tokens of some vocabularies; they are layout, not marks of the template.
        marks = special | {i for i, content in added.items() if content.strip()}
        in_content = set(self.encode_rendered(_SAMPLE_TEXT)) - special
        found = {i for text in self._sample_renderings() for i in self.encode_rendered(text)} & marks - in_content
        templates = self.chat_template or ""
        source = "\n".join(templates.values()) if isinstance(templates, dict) else templates
        found |= {i for i, content in added.items() if i in marks and content in source}
        return sorted(found)

    def _sample_renderings(self) -> list[str]:
        user, assistant = ({"role": role, "content": _SAMPLE_TEXT} for role in ("user", "assistant"))
        system = {"role": "system", "content": _SAMPLE_TEXT}
        texts, failure = [], None
        for messages in ([user, assistant], [user], [user, assistant, user], [system, user, assistant]):
            for prompt in (False, True):
                try:
                    texts.append(self.render_chat(messages, add_generation_prompt=prompt))
                except Exception as error:  # a template may refuse a system turn or a last user turn
                    failure = error
        if not texts:
            raise UserError(
                f"{self.path}: the chat template renders no conversation ({one_line(failure)})"
            ) from failure
        return texts

    def _digest_files(self) -> list[Path]:
        if (self.path / "tokenizer.json").is_file():
            return [self.path / "tokenizer.json"]  # the whole definition; the other files repeat parts of it
        files = [self.path / name for name in (*_HF_FILES, _SENTENCEPIECE)]
        return [f for f in files if f.is_file()] + sorted(self.path.glob("tokenization*.py"))


def _check_config(path: Path) -> None:
    """Raises UserError where transformers cannot read config.json, which it does before the tokenizer's files."""
    from transformers import AutoConfig

    if not (path / "config.json").is_file():
        return
    try:
        AutoConfig.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # as many kinds as for tokenizers
        raise UserError(
            f"{path / 'config.json'}: transformers cannot read it ({type(error).__name__}: {one_line(error)}); copy the file "
            "again"
        ) from error


class _SentencePieceTokenizer(Tokenizer):
    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self.path = path
        try:
            self._sp = SentencePieceProcessor(model_file=str(path / _SENTENCEPIECE))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path / _SENTENCEPIECE}: not a SentencePiece model ({one_line(error)})") from error
        self.vocab_size = self._sp.vocab_size()
        self.eos_id = None if self._sp.eos_id() < 0 else self._sp.eos_id()
        self.bos_id = None if self._sp.bos_id() < 0 else self._sp.bos_id()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._sp.encode(text, out_type=int) for text in texts]

    def encode_rendered(self, text: str) -> list[int]:
        return self.encode(text)  # SentencePiece never reads control tokens out of text

    def decode(self, ids: Sequence[int]) -> str:
        return self._sp.decode([int(i) for i in ids])

    def _digest_files(self) -> list[Path]:
        return [self.path / _SENTENCEPIECE]


_SAMPLE_TEXT = "0"


def one_line(error: BaseException | None, limit: int = 200) -> str:
    """The message of `error` on one line, for use inside a UserError."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
