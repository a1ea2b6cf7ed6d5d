"""The model's own tokenizer behind one small class: Hugging Face files, or a SentencePiece `tokenizer.model` alone."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_ssu.data.jsonl import BadLine
from megatron_ssu.errors import UserError, one_line
from megatron_ssu.models.hub import local_directory

# Any of these holds a vocabulary; without one transformers may build an empty tokenizer and say nothing.
_HF_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_HF_FILES = (*_HF_VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
_SENTENCEPIECE = "tokenizer.model"
# Names of the token that ends a document, most particular first. An instruct model's eos_token may end a chat turn instead.
_DOCUMENT_ENDS = ("<|end_of_text|>", "<|endoftext|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>")

Message = Mapping[str, Any]


def load_tokenizer(
    model_path: str | Path, *, trust_remote_code: bool = False, document_end: str | None = None
) -> Tokenizer:
    """The tokenizer in the directory `model_path`; nothing is fetched from elsewhere.

    `document_end` names the token that ends documents; None leaves the choice to `Tokenizer.document_end`.
    Raises UserError when the directory or its tokenizer files are missing or damaged, or the token is none of its own.
    """
    tokenizer = _load(model_path, trust_remote_code)
    if document_end is not None:
        tokenizer.end_documents_with(document_end)
    return tokenizer


def _load(model_path: str | Path, trust_remote_code: bool) -> Tokenizer:
    path = local_directory(model_path)
    if not path.is_dir():
        raise UserError(
            f"{path}: not a directory; model.path names a Hugging Face directory, or a hub id, with a tokenizer"
        )
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
    token, nor those of another token that the chat template writes. `encode_rendered` is for rendered chats, where they do.
    A document of plain text is `document_begin`, its ids, `document_end`.
    """

    path: Path
    vocab_size: int  # every id is below it, those of added tokens too
    eos_id: int | None
    _chosen_end: int | None = None

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
        """The id that ends a document of plain text: the one given to `load_tokenizer`, else the token that the tokenizer
        itself writes after a text, else eos_token where its name is known to end documents, else a special token with
        such a name (<|end_of_text|>, <|endoftext|>, </s>, ...), else eos_token.

        Raises UserError when the tokenizer has none of them.
        """
        end = self._document_end
        if end is None:
            raise UserError(
                f"{self.path}: the tokenizer has no eos_token, which ends documents; name a token with data.document_end"
            )
        return end

    @property
    def document_begin(self) -> list[int]:
        """The ids that the tokenizer itself writes before a text, such as <s> or <|begin_of_text|>; often none."""
        return self._frame[0]

    def end_documents_with(self, token: str) -> None:
        """Let `token` end documents. Raises UserError unless the vocabulary has it."""
        found = self._token_id(token)
        if found is None:
            raise UserError(
                f"data.document_end: must be a token of the tokenizer in {self.path}, got {token!r}; or leave the key out"
            )
        self._chosen_end = found

    @cached_property
    def _document_end(self) -> int | None:
        if self._chosen_end is not None:
            return self._chosen_end
        if self._frame[1]:
            return self._frame[1][-1]
        special = self._special_tokens()
        known = [special[name] for name in _DOCUMENT_ENDS if name in special]
        return self.eos_id if self.eos_id in known or not known else known[0]

    @property
    @abstractmethod
    def _frame(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer itself writes before and after a text."""

    @abstractmethod
    def _special_tokens(self) -> dict[str, int]:
        """Name -> id of the special tokens."""

    @abstractmethod
    def token_name(self, token: int) -> str:
        """The name of an id, as data.document_end takes it."""

    @abstractmethod
    def _token_id(self, token: str) -> int | None:
        """The id of a token by its name, None where there is none."""

    @property
    def marks(self) -> list[int]:
        """Sorted ids of the tokens that are not marked special but are kept out of plain text like those."""
        return []

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat_template)

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """Jinja source, or several by name; None without one."""
        return None

    @property
    def marks_answers(self) -> bool:
        """Whether the chat template says itself what the assistant says: {% generation %}."""
        return False

    def encode_marked(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids of a chat, and for each whether the template marks it as the assistant's; where `marks_answers`."""
        raise NotImplementedError

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode_rendered`, and from which to which character each token is. Raises BadLine where that is not known."""
        raise BadLine(f"the tokenizer in {self.path} does not say where its tokens are; set data.loss_on: all")

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """`messages` in the model's chat format. Raises UserError where it has none; its errors pass through."""
        raise UserError(f"{self.path}: the tokenizer has no chat template, so chats cannot be rendered")

    def special_token_ids_of_chat_template(self) -> list[int]:
        """Sorted ids of the special and added tokens that the chat template writes; none without a template."""
        return []

    @cached_property
    def digest(self) -> str:
        """sha256 over what decides how text is tokenized: vocabulary files, begin and end tokens, not the chat template."""
        return self.digest_ending(self._document_end)

    def digest_ending(self, end: int | None) -> str:
        """What `digest` is where documents end with the token `end`."""
        digest = hashlib.sha256(f"eos={self.eos_id}\n".encode())
        if self.document_begin or end != self.eos_id:
            digest.update(f"begin={self.document_begin} end={end}\n".encode())
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

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        if self._text_backend is not None:
            return [encoding.ids for encoding in self._text_backend.encode_batch(list(texts), add_special_tokens=False)]
        encoded = self._hf(
            list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        return encoded["input_ids"]

    @cached_property
    def _text_backend(self) -> Any:
        """A copy of the Rust tokenizer in which `marks` are special too, so that plain text does not become one of them;
        None where there are no marks."""
        if not self.marks:
            return None
        from tokenizers import Tokenizer as Backend

        definition = json.loads(self._hf.backend_tokenizer.to_str())
        for token in definition["added_tokens"]:
            token["special"] = token["special"] or token["id"] in self.marks
        backend = Backend.from_str(json.dumps(definition))
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        return backend

    @cached_property
    def marks(self) -> list[int]:  # type: ignore[override]
        if not self._hf.is_fast:  # Python tokenizers split every added token in plain text
            return []
        special = {i for i, token in self._hf.added_tokens_decoder.items() if token.special}
        try:
            written = set(self.special_token_ids_of_chat_template())
        except UserError:  # a template that renders nothing: chats are refused where there are some
            written = self._written_in_template()
        return sorted(written - special - set(self._hf.all_special_ids))

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        plain = self.encode_rendered(_SAMPLE_TEXT)
        framed = self._hf(_SAMPLE_TEXT, return_attention_mask=False, verbose=False)["input_ids"]
        for cut in range(len(framed) - len(plain) + 1):
            if plain and framed[cut : cut + len(plain)] == plain:
                return framed[:cut], framed[cut + len(plain) :]
        raise UserError(
            f"{self.path}: the tokenizer makes {framed} of the text {_SAMPLE_TEXT!r} and {plain} without special tokens, so "
            "which ones begin a document is not known; mend its post-processor"
        )

    def _special_tokens(self) -> dict[str, int]:
        special = {token.content: i for i, token in self._hf.added_tokens_decoder.items() if token.special}
        return special | dict(zip(self._hf.all_special_tokens, self._hf.all_special_ids))

    def token_name(self, token: int) -> str:
        return str(self._hf.convert_ids_to_tokens(token))

    def _token_id(self, token: str) -> int | None:
        return self._hf.get_vocab().get(token)

    def encode_rendered(self, text: str) -> list[int]:
        return self._hf(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._hf.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        return self._hf.chat_template

    @property
    def marks_answers(self) -> bool:
        template = self.chat_template
        return bool(re.search(r"\{%-?\s*generation\s*-?%\}", template)) if isinstance(template, str) else False

    def encode_marked(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[list[int], list[int]]:
        found = self._hf.apply_chat_template(
            [dict(m) for m in messages],
            tools=tools,  # type: ignore[arg-type]
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert not isinstance(found, str | list)
        return list(found["input_ids"]), list(found["assistant_masks"])

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if not self._hf.is_fast:
            return super().encode_with_offsets(text)
        found = self._hf(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return found["input_ids"], found["offset_mapping"]

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
    ) -> str:
        if not self.has_chat_template:
            return super().render_chat(messages)
        conversation = [dict(m) for m in messages]
        text = self._hf.apply_chat_template(
            conversation,
            tools=tools,  # type: ignore[arg-type]
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return str(text)

    def special_token_ids_of_chat_template(self) -> list[int]:
        """Sorted ids of special and added tokens in sample renderings or written literally in the template.

        Raises UserError when the template renders not even a user's and an assistant's turn.
        """
        if not self.has_chat_template:
            return []
        special = set(self._hf.all_special_ids)
        special |= {i for i, token in self._hf.added_tokens_decoder.items() if token.special}
        in_content = set(self.encode_rendered(_SAMPLE_TEXT)) - special
        found = {i for text in self._sample_renderings() for i in self.encode_rendered(text)}
        found &= special | self._no_layout() - in_content
        return sorted(found | self._written_in_template())

    def _no_layout(self) -> set[int]:
        """Added tokens without the runs of blanks of some vocabularies: those are layout, not marks of the template."""
        return {i for i, token in self._hf.added_tokens_decoder.items() if token.content.strip()}

    def _written_in_template(self) -> set[int]:
        """Added tokens that stand literally in the chat template's source."""
        templates = self.chat_template or ""
        source = "\n".join(templates.values()) if isinstance(templates, dict) else templates
        added = self._hf.added_tokens_decoder
        return {i for i in self._no_layout() if added[i].content in source}

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
        self._bos_id = None if self._sp.bos_id() < 0 else self._sp.bos_id()

    @property
    def _frame(self) -> tuple[list[int], list[int]]:
        # Such a directory is Llama's own, whose code begins every text with bos; the model file itself does not say.
        return ([] if self._bos_id is None else [self._bos_id]), []

    def _special_tokens(self) -> dict[str, int]:
        return {self._sp.id_to_piece(i): i for i in range(self.vocab_size) if self._sp.is_control(i)}

    def token_name(self, token: int) -> str:
        return str(self._sp.id_to_piece(token))

    def _token_id(self, token: str) -> int | None:
        found = self._sp.piece_to_id(token)
        return found if self._sp.id_to_piece(found) == token else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._sp.encode(text, out_type=int) for text in texts]

    def encode_rendered(self, text: str) -> list[int]:
        return self.encode(text)  # SentencePiece never reads control tokens out of text

    def decode(self, ids: Sequence[int]) -> str:
        return self._sp.decode([int(i) for i in ids])

    def _digest_files(self) -> list[Path]:
        return [self.path / _SENTENCEPIECE]


_SAMPLE_TEXT = "0"
