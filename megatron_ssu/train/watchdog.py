"""Ranks that died or hang: named, and the job ended in bounded time.

Every rank has a thread that writes a heartbeat into the job's store: where its main thread is (iteration, what it does,
whether it waits for other ranks). A rank whose main thread gets no further within the limit, or meets the broken
connection of a dead one, reads all heartbeats and names the rank whose heartbeat stopped, or, where all hearts beat, those
that are late or do not wait for others. (The first few such ranks read; the others wait for what they find.) The
first verdict goes into the store and is every rank's: a rank that ended after it is not taken for the one that hung.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_ssu.engine.ranks import WAITING_FILES, job_store
from megatron_ssu.errors import STATUS_RANK_LOST
from megatron_ssu.io.output import print_error

log = logging.getLogger(__name__)

_BROKEN = ("onnection", "closed by peer", "imed out", "NCCL", "gloo", "Broken pipe", "imeout")
_VERDICT = "verdict"
_FOUND = "found"
_STORE_TRIES = 3  # failures in a row
_READERS = 4  # ranks that read all heartbeats: n that read n would be too much for the store
_PATIENCE = 8  # heartbeats that the others wait for them, who take three


@dataclass(frozen=True)
class Heartbeat:
    """Where a rank is."""

    host: str
    beat: int  # counts heartbeats
    iteration: int
    doing: str
    waiting: bool  # for other ranks
    place: str  # file:line of the main thread

    def __str__(self) -> str:
        return f"{self.doing} of iteration {self.iteration} at {self.place} on {self.host}"


class Watchdog:
    """Context around training. `mark` says that the main thread got further."""

    def __init__(self, limit: float, *, beat: float = 5.0, end: Callable[[str], None] | None = None) -> None:
        """`limit`: seconds between two marks; `beat`: seconds between heartbeats; `end`: called with the line (default:
        print it and end the process with STATUS_RANK_LOST)."""
        self._limit, self._beat, self._end = limit, min(beat, limit / 4), end or _end
        self._marked, self._iteration, self._doing = time.monotonic(), 0, "start"
        self._waits = False  # said by the main thread
        self._main = threading.get_ident()
        self._stop = threading.Event()
        self._beats = 0
        self._thread: threading.Thread | None = None
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._store = _own_store(self._rank)

    def __enter__(self) -> Watchdog:
        if self._world > 1 and self._store is not None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(2 * self._beat)

    def mark(self, iteration: int, doing: str) -> None:
        """The main thread begins something: `doing` is data, forward-backward, optimizer, checkpoint, evaluation."""
        self._marked, self._iteration, self._doing = time.monotonic(), iteration, doing

    @contextmanager
    def waits(self) -> Iterator[None]:
        """Context in which the main thread waits for other ranks where no collective shows it: NCCL's calls return at once,
        and the rank then hangs where it reads a number from the GPU."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def _watch(self) -> None:
        failures = 0
        while not self._stop.wait(self._beat):
            try:
                self._publish()
                line = self._verdict()
                if line is None and time.monotonic() - self._marked > self._limit:
                    line = self._agree(f"no progress for {self._limit:.0f} s: {self.found()}")
                if line is not None:
                    if not self._stop.is_set():
                        self._end(line)
                    return
                failures = 0
            except Exception as error:  # busy; or it went away with the rank that held it
                failures += 1
                if failures == _STORE_TRIES or self._stop.is_set():
                    if not self._stop.is_set():
                        log.warning("watchdog: the job's store does not answer: %s", error)
                    return

    def _publish(self) -> None:
        waiting, place = self._where()
        self._beats += 1
        beat = Heartbeat(socket.gethostname(), self._beats, self._iteration, self._doing, waiting, place)
        self._store.set(_key(self._rank), json.dumps(asdict(beat)))

    def _verdict(self) -> str | None:
        """What a rank found already."""
        return self._store.get(_VERDICT).decode() if self._store.check([_VERDICT]) else None

    def _agree(self, line: str) -> str:
        """The first rank's line, for all."""
        if self._store.add(f"{_VERDICT}-count", 1) == 1:
            self._store.set(_VERDICT, line)
        return self._store.get(_VERDICT).decode()

    def _where(self) -> tuple[bool, str]:
        """Whether the main thread waits for other ranks, and where it is."""
        frame: Any = sys._current_frames().get(self._main)
        place, waiting, depth = "?", self._waits, 0
        while frame is not None and depth < 12:
            name = os.path.basename(frame.f_code.co_filename)
            if depth == 0:
                place = f"{name}:{frame.f_lineno}"
            waiting = waiting or name in WAITING_FILES
            frame, depth = frame.f_back, depth + 1
        return waiting, place

    def suspects(self) -> str:
        """Who holds the job up, in words; waits for three heartbeats, by which dead ranks show."""
        before = self._read()
        for _ in range(3):
            self._pause(self._beat)
        return describe(before, self._read(), self._world, self._rank)

    def found(self) -> str:
        """`suspects`, found here by the first few ranks that ask; the others wait for one of those, and ask where none
        answers."""
        if self._store.add("readers", 1) > _READERS:
            for _ in range(4 * _PATIENCE):
                if self._store.check([_FOUND]):
                    return self._store.get(_FOUND).decode()
                self._pause(self._beat / 4)
        line = self.suspects()
        self._store.set(_FOUND, line)
        if self._world > _READERS:  # who ends now may take the store along, which the others have still to ask
            self._pause(self._beat)
        return line

    def _pause(self, seconds: float) -> None:
        time.sleep(seconds)
        if threading.current_thread() is self._thread:  # else it beats on by itself
            self._publish()

    def lost(self, error: BaseException) -> str | None:
        """Who broke the connection that `error` reports, in words; None if every rank is alive: then it is our bug."""
        if self._thread is None or not any(word in str(error) for word in _BROKEN):
            return None
        try:
            said = self._verdict() or self.found()
        except Exception as gone:  # the store died as well
            return f"lost the other ranks ({_short(error)}), and the job's store with them ({_short(gone)})"
        return f"lost the other ranks ({_short(error)}): {said}"

    def _read(self) -> dict[int, Heartbeat]:
        found = {}
        for rank in range(self._world):
            if self._store.check([_key(rank)]):
                found[rank] = Heartbeat(**json.loads(self._store.get(_key(rank))))
        return found


def describe(before: dict[int, Heartbeat], after: dict[int, Heartbeat], world: int, me: int) -> str:
    """The line about the ranks that hold up the others, from two readings of all heartbeats."""
    silent = [
        r for r in range(world) if r != me and (r not in after or (r in before and after[r].beat == before[r].beat))
    ]
    if silent:
        lines = [f"rank {r} is dead or stopped ({after.get(r, 'it never began')})" for r in silent]
        return "; ".join(lines[:4]) + (f"; and {len(lines) - 4} more" if len(lines) > 4 else "")
    least = min(beat.iteration for beat in after.values())
    late = [r for r, beat in after.items() if beat.iteration == least]
    busy = [r for r in late if not after[r].waiting] or late
    if len(busy) == world:
        return f"all ranks are in {after[me]}; none is behind the others"
    lines = [f"rank {r} hangs ({after[r]})" for r in sorted(busy)]
    return "; ".join(lines[:4]) + (f"; and {len(lines) - 4} more" if len(lines) > 4 else "")


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"


def _own_store(rank: int) -> Any:
    """A connection of our own to the job's store: the main thread may hold the common one while it waits.

    Its keys carry the number of this watchdog in the job, counted by every rank alike: none reads another's."""
    store: Any = job_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    own: Any
    if isinstance(store, dist.TCPStore):
        own = dist.TCPStore(store.host, store.port, None, False, timedelta(seconds=30), wait_for_workers=False)
    else:
        own = store if isinstance(store, dist.FileStore) else None
    run = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if own is None:
        return None
    own = dist.PrefixStore(f"megatron-ssu/watchdog/{run}", own)
    return dist.PrefixStore(str(own.add(f"number/{rank}", 1)), own)


def _end(line: str) -> None:
    """Print on standard error and in the rank's log, and end the process: its main thread cannot be reached."""
    try:
        log.error(line)
        print_error(f"megatron-ssu: {line}")
    finally:
        os._exit(STATUS_RANK_LOST)
