"""What answers prompts: transformers, or vLLM where it is installed. An answer depends on its prompt and the seed, and in
transformers on the fixed batch that it is in; not on how many processes share the work."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_ssu.config.schema import GenerateSection
from megatron_ssu.data.tokenizer import Tokenizer
from megatron_ssu.errors import UserError, named_line
from megatron_ssu.generate.filters import Answer
from megatron_ssu.generate.prompts import Prompt
from megatron_ssu.io.extras import installed


class Backend(Protocol):
    """A model that answers."""

    name: str

    def answer(self, batch: Sequence[Prompt], number: int) -> list[Answer]:
        """The answers to the prompts of batch `number`, in their order."""


def backend_name(section: GenerateSection) -> str:
    """The backend that a section comes to here."""
    if section.backend != "auto":
        return section.backend
    return "vllm" if installed("vllm") else "transformers"


def open_backend(
    model: Path, tokenizer: Tokenizer, section: GenerateSection, *, trust_remote_code: bool = False
) -> Backend:
    """Load the model. Raises UserError where the backend's library cannot."""
    kind = Transformers if backend_name(section) == "transformers" else VLLM
    try:
        return kind(model, tokenizer, section, trust_remote_code)
    except Exception as error:  # both raise many kinds
        raise UserError(f"{model}: {kind.name} cannot load the model ({named_line(error)})") from error


def seed_of(seed: int, number: int) -> int:
    """A seed of its own for a batch or a prompt."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4], "little")


def turn_ends(configured: int | list[int] | None, tokenizer: Tokenizer) -> list[int]:
    """Ids that end an answer: those of generation_config.json, and the tokenizer's."""
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in (*listed, tokenizer.eos_id) if i is not None})


class Transformers:
    """Batches, padded on the left, through transformers' `generate`, on this rank's GPU where there is one."""

    name = "transformers"

    def __init__(self, model: Path, tokenizer: Tokenizer, section: GenerateSection, trust_remote_code: bool) -> None:
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        dtype: Any = {"auto": "auto", "bf16": torch.bfloat16, "fp32": torch.float32}[section.dtype]
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, local_files_only=True, trust_remote_code=trust_remote_code
        )
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
        self._model = loaded.to(self._device).eval()
        self._tokenizer, self._section = tokenizer, section
        self._ends = turn_ends(loaded.generation_config.eos_token_id, tokenizer)

    def answer(self, batch: Sequence[Prompt], number: int) -> list[Answer]:
        import torch

        section, longest = self._section, max(len(prompt.ids) for prompt in batch)
        padding = self._ends[0] if self._ends else 0
        ids = torch.tensor([[padding] * (longest - len(p.ids)) + p.ids for p in batch], device=self._device)
        mask = torch.tensor([[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in batch], device=self._device)
        sampled = {"temperature": section.temperature, "top_p": section.top_p, "top_k": section.top_k}
        torch.manual_seed(seed_of(section.seed, number))
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=section.max_new_tokens,
                do_sample=section.temperature > 0,
                eos_token_id=self._ends or None,
                pad_token_id=padding,
                **(sampled if section.temperature > 0 else {"temperature": None, "top_p": None, "top_k": None}),
            )
        return [self._ended(row) for row in output[:, longest:].tolist()]

    def _ended(self, ids: list[int]) -> Answer:
        stops = [place for place, token in enumerate(ids) if token in self._ends]
        kept = ids[: stops[0]] if stops else ids
        return Answer(self._tokenizer.decode(kept), kept, bool(stops))


class VLLM:
    """vLLM, which schedules a batch's prompts itself; every prompt has a seed of its own."""

    name = "vllm"

    def __init__(self, model: Path, tokenizer: Tokenizer, section: GenerateSection, trust_remote_code: bool) -> None:
        from vllm import LLM

        dtype = {"auto": "auto", "bf16": "bfloat16", "fp32": "float32"}[section.dtype]
        self._model = LLM(model=str(model), dtype=dtype, seed=section.seed, trust_remote_code=trust_remote_code)
        self._tokenizer, self._section = tokenizer, section
        self._ends = turn_ends(configured_ends(model), tokenizer)

    def answer(self, batch: Sequence[Prompt], number: int) -> list[Answer]:
        from vllm import SamplingParams

        section = self._section
        options = [
            SamplingParams(
                temperature=section.temperature,
                top_p=section.top_p,
                top_k=section.top_k,
                max_tokens=section.max_new_tokens,
                seed=seed_of(section.seed, prompt.row),
                stop_token_ids=self._ends,
            )
            for prompt in batch
        ]
        outputs = self._model.generate([{"prompt_token_ids": prompt.ids} for prompt in batch], options, use_tqdm=False)
        found = []
        for output in outputs:
            best = output.outputs[0]
            ids = list(best.token_ids)
            ended = best.finish_reason == "stop"
            kept = ids[:-1] if ended and ids and ids[-1] in self._ends else ids
            found.append(Answer(self._tokenizer.decode(kept), kept, ended))
        return found


def configured_ends(model: Path) -> int | list[int] | None:
    """eos_token_id of generation_config.json, where there is one."""
    file = model / "generation_config.json"
    found: int | list[int] | None = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    return found
