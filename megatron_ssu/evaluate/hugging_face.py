"""A Hugging Face directory in plain transformers, on this process's device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from megatron_ssu.data.tokenizer import load_tokenizer
from megatron_ssu.engine.device import has_cuda, local_device
from megatron_ssu.errors import UserError, named_line
from megatron_ssu.evaluate.model import Row, Score, Stop, longest_first
from megatron_ssu.generate.backends import turn_ends
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.hub import local_directory
from megatron_ssu.models.source import open_source

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class HuggingFaceModel:
    """See `evaluate.model.Model`."""

    def __init__(self, name: str, path: str | Path, *, dtype: str = "auto", batch_size: int = 8) -> None:
        """`dtype` auto: that of the files on a GPU; fp32 on a CPU, where bf16 is slow.

        Raises UserError where transformers cannot load the directory.
        """
        self.name, self.path, self._batch = name, str(path), batch_size
        self.fingerprint = model_fingerprint(path, "evaluate")
        self.positions = open_source(path, "evaluate").dims.positions
        self.tokenizer = load_tokenizer(path)
        logging.disable_progress_bar()
        wanted: Any = DTYPES.get(dtype, "auto" if has_cuda() else torch.float32)
        try:
            model = AutoModelForCausalLM.from_pretrained(local_directory(path), dtype=wanted, local_files_only=True)
        except Exception as error:  # transformers raises many kinds
            raise UserError(f"{path}: transformers cannot load the model ({named_line(error)})") from error
        self._device = local_device()
        self._model: Any = model.to(self._device).eval()  # type: ignore[arg-type]
        self.ends = turn_ends(model.generation_config.eos_token_id, self.tokenizer)

    @torch.inference_mode()
    def score(self, rows: Sequence[Row]) -> list[Score]:
        found: dict[int, Score] = {}
        for batch in longest_first([len(row.ids) for row in rows], self._batch):
            tokens, mask = padded([rows[i].ids[:-1] for i in batch], 0, left=False)
            logits = self._model(input_ids=tokens.to(self._device), attention_mask=mask.to(self._device)).logits
            for number, own in zip(batch, logits, strict=True):
                row = rows[number]
                place = slice(len(row.ids) - 1 - row.scored, len(row.ids) - 1)
                wanted = torch.tensor(row.ids[-row.scored :], device=self._device)
                logprobs = torch.log_softmax(own[place].float(), dim=-1)
                greedy = bool((logprobs.argmax(dim=-1) == wanted).all())
                found[number] = Score(float(logprobs.gather(1, wanted[:, None]).sum(dtype=torch.float64)), greedy)
        return [found[i] for i in range(len(rows))]

    @torch.inference_mode()
    def answer(self, prompts: Sequence[list[int]], limit: int, stop: Stop | None = None) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        padding = self.ends[0] if self.ends else 0
        for batch in longest_first([len(prompt) for prompt in prompts], self._batch):
            tokens, mask = padded([prompts[i] for i in batch], padding, left=True)
            output = self._model.generate(
                input_ids=tokens.to(self._device),
                attention_mask=mask.to(self._device),
                max_new_tokens=limit,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=self.ends or None,
                pad_token_id=padding,
                stopping_criteria=StoppingCriteriaList([_Stopping(stop, tokens.shape[1])] if stop else []),
            )
            for number, row in zip(batch, output[:, tokens.shape[1] :].tolist(), strict=True):
                found[number] = until_end(row, self.ends, stop)
        return [found[i] for i in range(len(prompts))]

    def close(self) -> None:
        del self._model


class _Stopping(StoppingCriteria):
    def __init__(self, stop: Stop, prompt: int) -> None:
        self._stop, self._prompt = stop, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:  # type: ignore[override]
        return torch.tensor([self._stop(row[self._prompt :]) for row in input_ids.tolist()], device=input_ids.device)


def padded(rows: Sequence[list[int]], padding: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [b, s] of token ids, and 1 where they are no padding."""
    longest = max(len(row) for row in rows)
    spare = [[padding] * (longest - len(row)) for row in rows]
    real = [[1] * len(row) for row in rows]
    none = [[0] * len(pad) for pad in spare]
    pairs = zip(spare, rows, strict=True) if left else zip(rows, spare, strict=True)
    masks = zip(none, real, strict=True) if left else zip(real, none, strict=True)
    return torch.tensor([[*a, *b] for a, b in pairs]), torch.tensor([[*a, *b] for a, b in masks])


def until_end(ids: list[int], ends: Sequence[int], stop: Stop | None) -> list[int]:
    """An answer up to and with the first token that ends it, without what a batch's longer answers leave after it."""
    for place, token in enumerate(ids):
        if token in ends or (stop is not None and stop(ids[: place + 1])):
            return ids[: place + 1]
    return ids
