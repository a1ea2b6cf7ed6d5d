"""How alike two sets of instructions are: dataset embedding similarity (DES, arXiv 2410.16006).

    DES = e1 . e2 / (|e1| |e2|)

where e is the mean embedding of a set's instructions: what users say, not what is answered.

An instruction is embedded by a sentence-transformers model, or by a language model as the mean over its tokens of a layer's
hidden states.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_ssu.config.sources import PLAIN
from megatron_ssu.data.chat import read_sample
from megatron_ssu.data.jsonl import BadLine, parse_object
from megatron_ssu.data.rows import open_rows
from megatron_ssu.errors import UserError, named_line
from megatron_ssu.io.extras import require
from megatron_ssu.models.hf_config import read_hf_config
from megatron_ssu.models.hub import local_directory

_RESAMPLES = 200


class Encoder(Protocol):
    """Embeds texts."""

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float64 [texts, d]."""


@dataclass(frozen=True)
class Similarity:
    """DES of two sets, and its standard deviation over sets that are drawn anew from each (bootstrap)."""

    first: str
    second: str
    value: float
    spread: float


def read_instructions(path: str | Path, samples: int | None, seed: int) -> list[str]:
    """What users say in every chat, turns joined by a line end; `samples` of them drawn by seed, in the order of the file.

    Raises UserError for a row that is no chat or text (file and row named), and where there are none.
    """
    found = []
    for number, line in open_rows(path, PLAIN):
        try:
            value = parse_object(line)
            content = read_sample({"output": "", "completion": "", **value} if "messages" not in value else value)
        except BadLine as error:
            raise UserError(f"{path}:{number}: {error}") from error
        turns = [content] if isinstance(content, str) else [t["content"] for t in content if t["role"] == "user"]
        text = "\n".join(turn for turn in turns if isinstance(turn, str)).strip()
        if not text:
            raise UserError(f"{path}:{number}: no turn of a user in it")
        found.append(text)
    if not found:
        raise UserError(f"{path}: no instructions in it")
    count = len(found) if samples is None else min(samples, len(found))
    return [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), count))]


def similarities(sets: dict[str, np.ndarray], seed: int) -> list[Similarity]:
    """DES of every pair of sets, of whose instructions these are the embeddings [n, d]."""
    draw, found = np.random.default_rng(seed), []
    for first, second in combinations(sets, 2):
        values = []
        for _ in range(_RESAMPLES):
            means = [e[draw.integers(0, len(e), len(e))].mean(axis=0) for e in (sets[first], sets[second])]
            values.append(cosine(*means))
        value = cosine(sets[first].mean(axis=0), sets[second].mean(axis=0))
        found.append(Similarity(first, second, value, float(np.std(values))))
    return found


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def sentence_encoder(directory: str | Path, batch_size: int) -> Encoder:
    """A sentence-transformers directory, such as LaBSE's. Raises UserError where it, or the library, cannot be loaded."""
    require("--encoder", "sentence_transformers", "encoder")
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(str(directory), local_files_only=True)
    except Exception as error:  # many kinds
        raise UserError(f"{directory}: sentence-transformers cannot load it ({named_line(error)})") from error

    def encode(texts: Sequence[str]) -> np.ndarray:
        return np.asarray(model.encode(list(texts), batch_size=batch_size, show_progress_bar=False), dtype=np.float64)

    return encode


def hidden_encoder(directory: str | Path, batch_size: int, layer: int) -> Encoder:
    """A language model in transformers: the mean over a text's tokens of the hidden states after `layer`, -1 for the last.

    Raises UserError where it cannot be loaded, or has no such layer.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    read_hf_config(str(directory), "--model")
    directory = local_directory(directory)
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype="auto")
    except Exception as error:  # many kinds
        raise UserError(f"{directory}: transformers cannot load it ({named_line(error)})") from error
    layers = model.config.num_hidden_layers
    if not -layers - 1 <= layer <= layers:
        raise UserError(f"--layer: must be from {-layers - 1} to {layers}, got {layer}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    longest = model.config.max_position_embeddings

    def encode(texts: Sequence[str]) -> np.ndarray:
        ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:longest] for text in texts]
        found = np.zeros((len(texts), model.config.hidden_size))
        for start in range(0, len(texts), batch_size):
            batch = ids[start : start + batch_size]
            width = max(1, *(len(row) for row in batch))
            tokens = torch.tensor([row + [0] * (width - len(row)) for row in batch], device=device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=device)
            with torch.inference_mode():
                hidden = model(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states[layer]
            means = (hidden.double() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
            found[start : start + len(batch)] = means.cpu().numpy()
        return found

    return encode
