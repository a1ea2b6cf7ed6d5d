"""Let a model answer prompts."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from multiprocessing.sharedctypes import Synchronized
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_ssu.config.checks.data import validate_generate
from megatron_ssu.config.schema import FilterSection, GenerateSection
from megatron_ssu.errors import UserError
from megatron_ssu.generate.answers import Job, answer_share, begin, described, is_made, open_job, publish
from megatron_ssu.io.atomic import check_writable

_EVERY = 30.0  # seconds between lines where there is no terminal


def run(run_file: None, options: argparse.Namespace, console: Console) -> int:
    section = section_of(options)
    validate_generate(section, "generate")
    if options.processes < 1:
        raise UserError(f"--processes: must be at least 1, got {options.processes}")
    check_writable(options.output)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _on_ranks(options, section, console)
        return 0
    job = _job(options, section)
    if is_made(job):
        console.print(f"{job.output}: made already; nothing to do", highlight=False, soft_wrap=True)
        return 0
    begin(job)
    with progress(console, len(job.prompts)) as advance:
        if options.processes == 1:
            answer_share(job, 0, 1, advance)
        else:
            _in_processes(job, options.processes, advance)
    console.print(described(job, publish(job)), highlight=False, soft_wrap=True)
    return 0


def section_of(options: argparse.Namespace) -> GenerateSection:
    """The options as the section of a run file that says the same."""
    given = vars(options)
    section = GenerateSection(prompts=options.prompts)
    own = {f.name: given[f.name] for f in fields(GenerateSection) if given.get(f.name) is not None}
    kept = {f.name: given[f.name] for f in fields(FilterSection) if given.get(f.name) is not None}
    return replace(section, **own, filter=replace(section.filter, **kept))


def _job(options: argparse.Namespace, section: GenerateSection) -> Job:
    return open_job(options.model, options.output, section, trust_remote_code=options.trust_remote_code, key="generate")


def _on_ranks(options: argparse.Namespace, section: GenerateSection, console: Console) -> None:
    """Under torchrun or SLURM every rank answers its share."""
    from megatron_ssu.engine.mesh import start_processes
    from megatron_ssu.engine.ranks import on_all_ranks, on_rank_zero
    from megatron_ssu.generate.replay import answered

    if options.processes > 1:
        raise UserError("--processes: does not go with torchrun, whose ranks share the work; leave it out")
    start_processes()
    job = on_all_ranks(lambda: _job(options, section))
    if on_rank_zero(lambda: is_made(job)):
        console.print(f"{job.output}: made already; nothing to do", highlight=False, soft_wrap=True)
        return
    console.print(described(job, answered(job, lambda done: None)), highlight=False, soft_wrap=True)


def _in_processes(job: Job, count: int, advance: Callable[[int], None]) -> None:
    """Answer in so many processes. Raises UserError with the first one's complaint, or where one was lost."""
    context = multiprocessing.get_context("spawn")  # forking a process that runs threads may hang the child
    done: list[Synchronized[int]] = [context.Value("q", 0) for _ in range(count)]
    complaints: Any = context.SimpleQueue()
    workers = [
        context.Process(target=_work, args=(job, rank, count, done[rank], complaints), daemon=True)
        for rank in range(count)
    ]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        advance(sum(value.value for value in done))
        if not complaints.empty() or any(worker.exitcode for worker in workers):
            break
        time.sleep(0.2)
    for worker in workers:
        if worker.is_alive():
            worker.terminate()
        worker.join()
    if not complaints.empty():
        raise UserError(complaints.get())
    lost = next((worker.exitcode for worker in workers if worker.exitcode), None)
    if lost is not None:
        raise UserError(
            f"{job.output}: a process was lost (status {lost}; out of memory?); start again, with fewer --processes"
        )
    advance(len(job.prompts))


def _work(job: Job, rank: int, ranks: int, done: Any, complaints: Any) -> None:
    os.environ["LOCAL_RANK"] = str(rank)

    def advance(count: int) -> None:
        done.value = count

    try:
        answer_share(job, rank, ranks, advance)
    except UserError as error:
        complaints.put(str(error))


@contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """A function of how many prompts are answered: a bar on a terminal, elsewhere a line now and then."""
    if not console.is_terminal:
        last = time.monotonic()

        def tell(done: int) -> None:
            nonlocal last
            if time.monotonic() - last >= _EVERY:
                last = time.monotonic()
                console.print(f"{done:,} of {total:,} prompts answered", highlight=False)

        yield tell
        return
    columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, completed=done)
