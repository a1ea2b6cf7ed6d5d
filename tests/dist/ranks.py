"""Ranks for tests: processes that run small distributed functions over gloo.

Every job gets processes of its own, forked from a server that has imported everything, so that a start costs a fraction
of a second. Processes that go on to another job would keep the threads of the first one's gloo groups, each of which wakes up a
hundred times per second.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

PRELOADED = ["transformers", "megatron_ssu.commands.train", "megatron_ssu.models.specs", "tests.dist.work"]


class RankError(Exception):
    """What a rank raised: `kind` is the exception's class name, the text its traceback; `agreed`: all ranks raise it, and
    rank 0 alone tells it."""

    def __init__(self, kind: str, message: str, text: str, agreed: bool) -> None:
        super().__init__(text)
        self.kind, self.message, self.agreed = kind, message, agreed


def share_a_device() -> None:
    """Let all gloo groups of this process use one device: every device has a thread that wakes up 100 times per second,
    and groups outlive the work that they were made for."""
    from torch.distributed import ProcessGroupGloo, distributed_c10d

    device = ProcessGroupGloo.create_default_device()

    class SharedDevice(ProcessGroupGloo):
        def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
            options = ProcessGroupGloo._Options()
            options._devices, options._timeout = [device], timeout
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = SharedDevice  # type: ignore[misc]


def _serve(rank: int, world: int, store: str, pipe: Any, work: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    from megatron_ssu.engine.cpu_backend import install_cpu_backend

    os.environ["WORLD_SIZE"] = str(world)  # as torchrun sets it; run files are checked against it
    torch.set_num_threads(1)
    install_cpu_backend()
    share_a_device()
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        result = ("done", work(*args, **kwargs))
        dist.barrier()
    except Exception as error:
        agreed = getattr(error, "agreed", False)
        result = ("raised", type(error).__name__, str(error), traceback.format_exc(), agreed)
    pipe.send(result)
    pipe.poll(60)  # tensors go through files that live as long as this process: wait until they are read
    os._exit(0)  # taking the groups down takes longer than the work of many a test


class Ranks:
    """`run(work, world, *args)` runs a module-level function on `world` ranks and returns their results in order."""

    def __init__(self) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def run(self, work: Callable, world: int, *args: Any, timeout: float = 300.0, **kwargs: Any) -> list[Any]:
        """Raises RankError with the first failing rank's traceback."""
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            pipes, processes = [], []
            try:
                for rank in range(world):
                    ours, theirs = self._context.Pipe()
                    process = self._context.Process(
                        target=_serve, args=(rank, world, store, theirs, work, args, kwargs)
                    )
                    process.start()
                    theirs.close()
                    pipes.append(ours)
                    processes.append(process)
                answers = [self._answer(rank, pipe, timeout) for rank, pipe in enumerate(pipes)]
            finally:
                for process in processes:
                    process.kill()
                    process.join()
        for answer in answers:
            if answer[0] == "raised":
                raise RankError(*answer[1:])
        return [answer[1] for answer in answers]

    @staticmethod
    def _answer(rank: int, pipe: Any, timeout: float) -> tuple:
        if not pipe.poll(timeout):
            raise TimeoutError(f"rank {rank} did not answer in {timeout} s")
        try:
            return pipe.recv()
        except EOFError:
            raise RuntimeError(f"rank {rank} died without an answer") from None
