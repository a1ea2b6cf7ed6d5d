"""The process of the kill test that has imported everything and forks ranks; see test_kills.py."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from megatron_ssu.engine.cpu_backend import install_cpu_backend
from megatron_ssu.engine.ranks import on_rank_zero
from megatron_ssu.train.checkpoints import Checkpoints
from tests.dist import resume_work
from tests.dist.work import mesh


def rank(number: int, store: str, order: dict[str, Any]) -> None:
    """Train from the newest checkpoint to the end; leave a digest of this rank's weights and moments."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    install_cpu_backend()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=order["world"])
    directory = Path(order["directory"])
    run = resume_work.make_run(
        order["model"],
        mesh(2),
        str(directory),
        iterations=order["iterations"],
        interval=order["interval"],
        async_save=True,
        micro_batch_size=4,  # few exchanges per step: on a CPU they take the time
    )
    on_rank_zero(Checkpoints(directory).clean)
    answer = resume_work.train_run(run, order["shield"])
    digest = hashlib.sha256()
    for tensor in (*answer["weights"], *answer["moments"]):
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    (directory / f"bits-{number}").write_text(digest.hexdigest())
    dist.barrier()


def fork(number: int, store: str, order: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.dup2(2, 1)  # standard output carries answers
        rank(number, store, order)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait(pids: list[int], kill_rest: bool) -> list[int]:
    statuses: dict[int, int] = {}
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
        if kill_rest and any(status != 0 for status in statuses.values()):
            for pid in set(pids) - set(statuses):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [statuses[pid] for pid in pids]


def main() -> None:
    pids: list[int] = []
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any] = {}
        if "start" in order:
            store = tempfile.mktemp(prefix="kills-")
            pids = [fork(number, store, order["start"]) for number in range(order["start"]["world"])]
            answer = {"pids": pids}
        elif "wait" in order:
            answer = {"statuses": wait(pids, order["wait"])}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
