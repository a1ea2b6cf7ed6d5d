"""A model on a mesh: sharded over tensor-, pipeline-, expert- and data-parallel ranks, from a Hugging Face directory or a run's
checkpoint. Rank 0 asks; the other ranks `serve` until it is done.

Answers are made by running the whole sequence again for every token, without a cache of keys and values, so that they are made
by what trained: every family, window and rope as it is.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ssu.config.schema import RunConfig
from megatron_ssu.data.tokenizer import load_tokenizer
from megatron_ssu.engine.ranks import gathered, on_rank_zero
from megatron_ssu.errors import UserError
from megatron_ssu.evaluate.measured import Measured
from megatron_ssu.evaluate.model import Row, Score, Stop, longest_first
from megatron_ssu.evaluate.questions import Keep, Questions
from megatron_ssu.generate.backends import configured_ends, turn_ends
from megatron_ssu.models.parallel_model import ParallelModel
from megatron_ssu.train.micro_batches import Batch, read_batch, run_chunk, run_schedule

_FP8_TOKENS = 16  # what FP8 GEMMs need a multiple of


class MeshModel:
    """See `evaluate.model.Model`. Made on all ranks; what rank 0 asks, all ranks do."""

    def __init__(self, name: str, path: str, fingerprint: str, model: ParallelModel, batch_size: int = 8) -> None:
        """`batch_size`: rows of a data-parallel replica at a time."""
        self.name, self.path, self.fingerprint = name, path, fingerprint
        self.positions = model.source.dims.positions
        self.tokenizer = load_tokenizer(model.source.path)
        self.ends = turn_ends(configured_ends(model.source.path), self.tokenizer)
        self._model, self._micro = model, batch_size
        self.mark: Callable[[], None] = lambda: None  # called before every pass
        for chunk in model.chunks:
            chunk.eval()

    def serve(self) -> None:
        """Do what rank 0 asks, until it closes."""
        while (asked := self._shared(None)) is not None:
            kind, arguments = asked
            if kind == "score":
                self._score(*arguments)
            else:
                self._answer(*arguments)

    def close(self) -> None:
        """End the other ranks' `serve`."""
        if self._model.mesh.rank == 0:
            self._shared(None)
        del self._model
        gc.collect()

    def score(self, rows: Sequence[Row]) -> list[Score]:
        self._shared(("score", (list(rows),)))
        return self._score(list(rows))

    def answer(self, prompts: Sequence[list[int]], limit: int, stop: Stop | None = None) -> list[list[int]]:
        self._shared(("answer", (list(prompts), limit)))
        return self._answer(list(prompts), limit, stop)

    def _shared(self, value: Any) -> Any:
        """Rank 0's value, on all ranks. Collective."""
        if self._model.mesh.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def _rounds(self, lengths: list[int]) -> Iterator[list[list[int]]]:
        """By data-parallel rank the numbers of the rows that are read together, the longest first."""
        mesh = self._model.mesh
        for members in longest_first(lengths, self._micro * mesh.data):
            yield [members[rank :: mesh.data] for rank in range(mesh.data)]

    @torch.no_grad()  # megatron keeps ropes that it computed: an inference tensor would not train
    def _score(self, rows: list[Row]) -> list[Score]:
        found: dict[int, Score] = {}
        for members in self._rounds([len(row.ids) for row in rows]):
            own = [rows[i] for i in members[self._model.mesh.data_rank]]
            width = max(len(rows[i].ids) for part in members for i in part) - 1
            picked = self._forward([row.ids[:-1] for row in own], width, [row.ids[1:] for row in own])
            scores = None
            if picked is not None:
                logprobs, likeliest = picked
                scores = [_score_of(row, logprobs[i], likeliest[i]) for i, row in enumerate(own)]
            for part, result in zip(members, self._by_replica(scores), strict=True):
                found |= dict(zip(part, result, strict=True))
        return [found[i] for i in range(len(rows))]

    @torch.no_grad()  # megatron keeps ropes that it computed: an inference tensor would not train
    def _answer(self, prompts: list[list[int]], limit: int, stop: Stop | None = None) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for members in self._rounds([len(prompt) for prompt in prompts]):
            new: dict[int, list[int]] = {i: [] for part in members for i in part}
            done: set[int] = set()
            while len(done) < len(new):
                own = members[self._model.mesh.data_rank]
                rows = [prompts[i] + new[i] for i in own]
                width = max(len(prompts[i]) + len(new[i]) for i in new)
                picked = self._forward(rows, width)
                tokens = None
                if picked is not None:
                    tokens = [int(picked[1][n, len(row) - 1]) for n, row in enumerate(rows)]
                for part, result in zip(members, self._by_replica(tokens), strict=True):
                    for i, token in zip(part, result, strict=True):
                        if i not in done:
                            new[i].append(token)
                ends = {
                    i for i, ids in new.items() if ids[-1] in self.ends or len(ids) >= limit or (stop and stop(ids))
                }
                done |= set(self._shared(sorted(ends)))
            found |= new
        return [found[i] for i in range(len(prompts))]

    def _by_replica(self, value: Any) -> list[Any]:
        """What the first rank of every replica's last stage has, by data-parallel rank, on all ranks. Collective."""
        mesh = self._model.mesh
        speaks = mesh.last_stage and mesh.tensor_rank == 0
        values = gathered((mesh.data_rank, value) if speaks else None)
        return [result for _, result in sorted((v for v in values if v is not None), key=lambda pair: pair[0])]

    def _forward(
        self, rows: list[list[int]], width: int, labels: list[list[int]] | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Rows through the model, padded on the right to `width`.

        Log-probabilities of the labels (0 without), fp32 [b, s], and the likeliest tokens, int64 [b, s]; None before the last
        stage.
        """
        self.mark()
        run, mesh = self._model.run, self._model.mesh
        sequence = mesh.tensor if run.parallel.sequence_parallel else 1
        step = math.lcm(sequence, _FP8_TOKENS if run.precision.transformer.get("fp8") else 1)
        width = -(-width // step) * step
        batch = {
            "tokens": _right_padded(rows, width, self._micro),
            "labels": _right_padded(labels or [], width, self._micro),
            "loss_mask": torch.ones(self._micro, width),
            "position_ids": torch.arange(width).expand(self._micro, width).contiguous(),
        }
        sizes = replace(run.train, micro_batch_size=self._micro)  # what pipeline stages exchange
        run = replace(run, data=replace(run.data, sequence_length=width), train=sizes)

        def forward(iterator: Iterator[Batch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
            read = read_batch(iterator, run)
            return run_chunk(chunk, read), lambda logits, non_loss_data: _picked(
                chunk, logits, read["labels"] if labels is not None else None
            )

        found = run_schedule(run, forward, self._model.chunks, iter([batch]), 1, forward_only=True, collect=True)
        return found[0] if mesh.last_stage else None


def answered(
    model: MeshModel, questions: Questions, rank: int, keep: Keep = lambda chats, lines: None
) -> Sequence[Measured]:
    """What is measured of a model on the mesh: rank 0 asks, the others serve; on all ranks. Collective.

    Raises UserError, on all ranks alike, where rank 0 finds what is asked cannot be.
    """
    found: Sequence[Measured] = []
    problem: UserError | None = None
    if rank:
        model.serve()
    else:
        try:
            found = questions.measure(model, model.tokenizer.path, keep)
        except UserError as error:
            problem = error
    model.close()

    def result() -> Sequence[Measured]:
        if problem is not None:
            raise problem
        return found

    return on_rank_zero(result)


def check_run(run: RunConfig) -> RunConfig:
    """The run file for a model that is only asked. Raises UserError for what has no such mesh."""
    if run.parallel.context > 1:
        raise UserError("parallel.context_parallel_size: must be 1 to evaluate; take tensor or pipeline parallelism")
    kept = {k: v for k, v in run.parallel.transformer.items() if k != "virtual_pipeline_model_parallel_size"}
    return replace(
        run,
        parallel=replace(run.parallel, transformer=kept),
        data=replace(run.data, train=[], packing="stream", cross_document_attention=True),
    )


def _right_padded(rows: list[list[int]], width: int, count: int) -> Tensor:
    """int64 [count, width]; what follows a row is not seen by it."""
    found = torch.zeros(count, width, dtype=torch.int64)
    for number, row in enumerate(rows):
        found[number, : len(row)] = torch.tensor(row)
    return found


def _picked(chunk: Any, logits: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities of labels [b, s] and likeliest tokens [b, s] from this rank's logits [b, s, V / TP]. Collective."""
    likeliest = _argmax(logits)
    if labels is None:
        return torch.zeros(likeliest.shape), likeliest.cpu()
    losses = chunk.compute_language_model_loss(labels, logits.transpose(0, 1).contiguous())
    return -losses.float().cpu(), likeliest.cpu()


def _argmax(logits: Tensor) -> Tensor:
    """int64 [b, s]: over the vocabulary of all tensor-parallel ranks; the lowest of equals."""
    values, places = logits.float().max(dim=-1)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return places
    places = places + group.rank() * logits.shape[-1]
    all_values = [torch.empty_like(values) for _ in range(group.size())]
    all_places = [torch.empty_like(places) for _ in range(group.size())]
    dist.all_gather(all_values, values.contiguous(), group=group)
    dist.all_gather(all_places, places.contiguous(), group=group)
    best = torch.stack(all_values).argmax(dim=0)
    return torch.stack(all_places).gather(0, best[None])[0]


def _score_of(row: Row, logprobs: Tensor, likeliest: Tensor) -> Score:
    place = slice(len(row.ids) - 1 - row.scored, len(row.ids) - 1)
    greedy = bool((likeliest[place] == torch.tensor(row.ids[-row.scored :])).all())
    return Score(float(logprobs[place].sum(dtype=torch.float64)), greedy)
