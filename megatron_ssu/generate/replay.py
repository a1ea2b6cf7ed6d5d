"""Generative replay: answers of the model that a run starts from, as a part of what it trains on."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from megatron_ssu.config.schema import RunConfig
from megatron_ssu.engine.ranks import is_rank_zero, on_all_ranks, on_rank_zero
from megatron_ssu.generate.answers import Job, answer_share, begin, described, is_made, open_job, publish
from megatron_ssu.models.source import Source

log = logging.getLogger(__name__)
NAME = "replay.jsonl"


def with_answers(run: RunConfig, source: Source, console: Console) -> RunConfig:
    """The run file with the answers in place of replay.generate; made where they are missing, by all ranks. Collective.

    Raises UserError on all ranks alike: bad prompts, or a file that follows from something else.
    """
    section, target = run.replay.generate, Path(run.checkpoint.directory) / NAME
    assert section is not None
    job = on_all_ranks(lambda: open_job(source.path, target, section, trust_remote_code=run.model.trust_remote_code))
    if not on_rank_zero(lambda: is_made(job)):
        console.print(
            f"replay: answering {len(job.prompts):,} prompts of {section.prompts}", highlight=False, markup=False
        )
        counts = answered(job, lambda done: None)
        console.print(described(job, counts), highlight=False, markup=False, soft_wrap=True)
    return replace(run, replay=replace(run.replay, path=[str(target)], generate=None))


def answered(job: Job, advance: Callable[[int], None]) -> dict[str, int]:
    """Answer the job's prompts, each rank its share, and write the file; what came out. Collective.

    What the model took of the GPU is given back.
    """
    on_rank_zero(lambda: begin(job))
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    on_all_ranks(lambda: answer_share(job, rank, ranks, advance))
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    counts: dict[str, int] = on_rank_zero(lambda: publish(job))
    if is_rank_zero():
        log.info("%s", described(job, counts))
    return counts
