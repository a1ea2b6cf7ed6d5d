"""Ranks for tests: processes that are started once and run many small distributed functions over gloo.

They are forked from a server that has imported everything, so that a start costs a fraction of a second.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp


PRELOADED = ["transformers", "megatron_ssu.commands", "tests.dist.work"]


class RankError(Exception):
    """What a rank raised: `kind` is the exception's class name, the text its traceback."""

    def __init__(self, kind: str, message: str, text: str) -> None:
        super().__init__(text)
        self.kind, self.message = kind, message


def _serve(rank: int, pipe: Any) -> None:
    import torch

    torch.set_num_threads(1)
    import torch.distributed as dist

    from megatron_ssu import runtime

    runtime.install_cpu_backend()
    while True:
        job = pipe.recv()
        if job is None:
            os._exit(0)  # the threads that gloo groups leave behind take seconds to end
        work, world, store, args, kwargs = job
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
            result = ("done", work(*args, **kwargs))
            dist.barrier()
        except Exception as error:
            result = ("raised", type(error).__name__, str(error), traceback.format_exc())
        finally:
            runtime.stop_processes()
        pipe.send(result)


class Ranks:
    """`run(work, world, *args)` runs a module-level function on `world` ranks and returns their results in order."""

    def __init__(self, most: int) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.most, self.pipes, self.processes = most, [], []
        for rank in range(most):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=False)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, work: Callable, world: int, *args: Any, timeout: float = 300.0, **kwargs: Any) -> list[Any]:
        """Raises RankError with the first failing rank's traceback."""
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            for pipe in self.pipes[:world]:
                pipe.send((work, world, store, args, kwargs))
            answers = []
            for rank, pipe in enumerate(self.pipes[:world]):
                if not pipe.poll(timeout):
                    raise TimeoutError(f"rank {rank} did not answer in {timeout} s")
                answers.append(pipe.recv())
        for answer in answers:
            if answer[0] == "raised":
                raise RankError(*answer[1:])
        return [answer[1] for answer in answers]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(20)
            if process.is_alive():
                process.kill()
