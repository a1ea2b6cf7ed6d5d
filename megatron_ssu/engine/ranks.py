"""Agreement of ranks: what one does for all, what all do and fail alike, and the store they share."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_ssu.errors import UserError, agreed_error

T = TypeVar("T")

# Files that a thread runs through while it waits for other ranks: torch's collectives and megatron's exchanges between stages.
WAITING_FILES = ("distributed_c10d.py", "p2p_communication.py")


def job_store() -> dist.Store:
    """The store through which the job's process group was made."""
    return dist.distributed_c10d._get_default_store()


def is_rank_zero() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run `work` on rank 0; every rank gets its result, or raises its UserError alike.

    Raises:
        UserError: the one that rank 0 raised.
        RuntimeError: on the other ranks when rank 0 met a bug; rank 0 keeps the traceback.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    verdict: list[Any] = [None, None]
    bug: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            verdict = ["done", work()]
        except UserError as error:
            verdict = ["refused", str(error)]
        except Exception as error:
            verdict, bug = ["failed", f"{type(error).__name__}: {error}"], error
    dist.broadcast_object_list(verdict, src=0)
    if bug is not None:
        raise bug
    if verdict[0] == "refused":
        raise agreed_error(verdict[1])
    if verdict[0] == "failed":
        raise RuntimeError(f"rank 0 failed: {verdict[1]}")
    return verdict[1]


def gathered(value: T) -> list[T]:
    """Every rank's `value`, in the order of ranks; collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_each_node(name: str, work: Callable[[], object], patience: timedelta) -> None:
    """Run `work`, which may take longer than a collective may wait, on the first rank of every node; the node's others wait.

    `name`: of this work, told apart from other work of the job. Collective. Raises the first UserError on all ranks alike.
    """
    store, node = job_store(), os.environ.get("GROUP_RANK", "0")
    local, key = os.environ.get("LOCAL_RANK", "0"), f"megatron-ssu/{name}/"
    message = ""
    if local == "0":
        try:
            work()
        except UserError as error:
            message = str(error)
        store.set(key + node, message)
    nodes = sorted(set(gathered(node)))
    store.wait([key + each for each in nodes], patience)
    messages = [store.get(key + each).decode() for each in nodes]
    if first := next((m for m in messages if m), None):
        raise agreed_error(first)


def on_all_ranks(work: Callable[[], T]) -> T:
    """Run `work` on every rank; if any rank raises a UserError all raise the first one (by rank), so none waits for it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    result, message = None, None
    try:
        result = work()
    except UserError as error:
        message = str(error)
    first = next((m for m in gathered(message) if m is not None), None)
    if first is not None:
        raise agreed_error(first)
    return result  # type: ignore[return-value]
