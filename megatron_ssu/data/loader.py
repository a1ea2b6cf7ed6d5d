"""Samples to batches: an order of samples that does not depend on the mesh and resumes at any sample."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megatron_ssu.errors import UserError, named_line, one_line

KEYS = ("tokens", "labels", "loss_mask", "position_ids")
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_PADDING = -1  # in place of a sample number: a sample without loss


class Samples(Sized, Protocol):
    """A map-style dataset with a length."""

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...


def iterate(
    dataset: Samples,
    *,
    micro_batch_size: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    consumed_samples: int = 0,
    stop: int | None = None,
    pad_to: int | None = None,
    loader_workers: int = 0,
    pin_memory: bool | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Micro batches of rank `dp_rank` of `dp_size`, in the order of the sample numbers.

    Micro step k takes the next `micro_batch_size * dp_size` samples after `consumed_samples`, each rank its slice in
    order of rank; so a global batch holds the same samples whatever the mesh and the micro batch size. It ends before
    sample `stop` (default: the dataset's length). What does not fill a micro step is dropped; with `pad_to` (a multiple
    of `micro_batch_size * dp_size`) samples without loss fill the count up to a multiple of it, so that nothing is.

    Yields dicts of `tokens`, `labels`, `position_ids` int64 [b, s] and `loss_mask` float32 [b, s], on the CPU.
    Raises UserError when a data file cannot be read.
    """
    step = micro_batch_size * dp_size
    if not 0 <= dp_rank < dp_size or micro_batch_size < 1 or consumed_samples < 0:
        raise ValueError(f"{dp_rank=} {dp_size=} {micro_batch_size=} {consumed_samples=}")
    if pad_to is not None and pad_to % step:
        raise ValueError(
            f"pad_to must be a multiple of {micro_batch_size} (micro batch) x {dp_size} (data parallel), got {pad_to}"
        )
    end = len(dataset) if stop is None else min(stop, len(dataset))
    loader = DataLoader(
        _Guarded(dataset),
        batch_sampler=_Order(consumed_samples, end, micro_batch_size, dp_rank, dp_size, pad_to),
        num_workers=loader_workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        generator=torch.Generator(),  # of its own: the loader draws a seed, which must not move the run's
        worker_init_fn=_signals_are_the_parents() if loader_workers else None,
    )
    return _raise_errors(loader)


def _raise_errors(loader: DataLoader) -> Iterator[dict[str, Tensor]]:
    with _signals_held():
        batches = iter(loader)  # starts the loader processes
    while True:
        try:
            batch = next(batches, None)
        except (EOFError, ConnectionError) as error:
            if not loader.num_workers or str(error).startswith("Caught"):  # the dataset's own, with its traceback
                raise
            raise RuntimeError(f"DataLoader worker went while it handed over a batch: {named_line(error)}") from error
        if batch is None:
            return
        if isinstance(batch, str):
            raise UserError(batch)
        yield batch


def lost_loader(error: BaseException) -> str | None:
    """What to say of a data loader process that was killed, where `error` is torch's word of it; else None.

    torch raises it wherever the main thread is when the process ends.
    """
    if not isinstance(error, RuntimeError) or not str(error).startswith("DataLoader worker"):
        return None
    advice = "if memory ran out, lower data.loader_workers, and start again"
    return f"a data loader process was killed ({one_line(error)}); {advice}"


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold the signals that stop a run until the end of the block; a process forked within it begins with them held."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _signals_are_the_parents() -> Callable[[int], None]:
    """What a loader process does first: leave signals to its rank, which is sent them as well.

    torchrun and SLURM signal all processes of a rank; a loader process that went would take the rank with it, before its
    checkpoint. SIGTERM counts once the rank itself ends: that is how Python ends the processes that are left.
    """
    ending = multiprocessing.RawValue("b", 0)  # shared; an Event has a lock, on which a signal in a signal would hang
    atexit.register(setattr, ending, "value", 1)

    def terminate(number: int, frame: Any) -> None:
        if ending.value:
            os._exit(0)

    def begin(worker: int) -> None:
        for number in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, terminate)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)  # held since the fork: see _signals_held
        sys.excepthook = partial(_say_unless_hung_up, sys.excepthook)

    return begin


def _say_unless_hung_up(
    say: Callable[..., Any], kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """`say`, unless a connection ended. A loader process's thread that hands tensors over calls `sys.excepthook` where the
    rank went in the middle, be it that another of its loader processes was killed; the rank says why."""
    if not issubclass(kind, EOFError | ConnectionError):
        say(kind, error, trace)


class _Order:
    """Lists of sample numbers, one per micro step of one rank."""

    def __init__(self, begin: int, end: int, micro: int, rank: int, ranks: int, pad_to: int | None) -> None:
        step = micro * ranks
        count = max(0, end - begin)
        self._steps = count // step if pad_to is None else -(-count // pad_to) * (pad_to // step)
        self._begin, self._end, self._micro, self._rank, self._step = begin, end, micro, rank, step

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        for k in range(self._steps):
            first = self._begin + k * self._step + self._rank * self._micro
            yield [i if i < self._end else _PADDING for i in range(first, first + self._micro)]


class _Guarded(Dataset):
    """The dataset with padding samples, and UserErrors as values: raised in a loader process they grow a traceback."""

    def __init__(self, dataset: Samples) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            sample = self._dataset[max(index, 0)]
        except UserError as error:
            return str(error)
        sample = {key: sample[key] for key in KEYS}
        if index == _PADDING:
            sample["loss_mask"] = torch.zeros_like(sample["loss_mask"])
        return sample


def _collate(samples: list[Any]) -> dict[str, Tensor] | str:
    for sample in samples:
        if isinstance(sample, str):
            return sample
    return {key: torch.stack([sample[key] for sample in samples]) for key in KEYS}
