"""One run directory, one job: an exclusive lock, held by rank 0 while a command writes there.

The lock is a file `run.lock.N` in the run's directory with the holder's host, process and SLURM job; its modification time is
the holder's heartbeat. On the same machine the kernel's lock on the file (flock) shows that a holder lives, and the
process table, outside containers, that it is dead. Any other holder is watched: it lives when a heartbeat comes, and is dead
when none came for WATCH seconds and its last one is older than LIMIT, so that clocks that disagree end no job. WATCH seconds
are enough where the kernel's lock is free, for the earlier life of a SLURM job that was put back, and for that of a launch that
torchrun started again.

A takeover makes `run.lock.N+1`, by link(2), which one starter alone can: then whoever finds another lock file there than the
one that was judged dead steps back. So of several starters at most one holds the run, also without flock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from megatron_ssu.errors import UserError
from megatron_ssu.io.output import print_error

log = logging.getLogger(__name__)

BEAT = 10.0  # seconds between heartbeats
LIMIT = 180.0  # seconds without one after which a holder on another machine may be dead
WATCH = 3 * BEAT  # seconds that such a holder is then watched
_NAME = "run.lock"
_TRIES = 20
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EACCES)
_GONE = (errno.ENOENT, errno.ESTALE)


@dataclass(frozen=True)
class Holder:
    """Who holds a lock; empty or 0: not known."""

    command: str = ""
    host: str = ""
    boot: str = ""  # of the kernel: the same on one machine, also in its containers
    pids: str = ""  # namespace of `pid`
    pid: int = 0
    born: int = 0  # when the process began, in clock ticks since the machine did
    job: str = ""  # SLURM's job id
    life: int = 0  # how often SLURM has put the job back
    launch: str = ""  # torchrun's --rdzv-id
    restart: int = 0  # how often torchrun has started the ranks again
    started: float = 0.0
    flock: bool = False  # whether the kernel's lock is held on the file
    token: str = ""

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"`{self.command}` on {self.host or 'an unknown host'} (process {self.pid}{job})"

    def is_earlier_life_of(self, other: Holder) -> bool:
        """Whether SLURM or torchrun ended this one before it started `other`."""
        same_job = bool(self.job) and self.job == other.job
        if same_job and self.life < other.life:
            return True
        named = self.launch not in ("", "none")  # torchrun's id is `none` where nobody gives one
        same_launch = self.launch == other.launch and (named or (self.launch == "none" and same_job))
        return same_launch and self.restart < other.restart


@dataclass(frozen=True)
class _Found:
    """A lock file as it was read."""

    path: Path
    holder: Holder
    beat: float  # modification time, seconds since the epoch


def this_process(command: str) -> Holder:
    """What the lock says of this process."""
    return Holder(
        command=command,
        host=socket.gethostname(),
        boot=_read(Path("/proc/sys/kernel/random/boot_id")),
        pids=_link(Path("/proc/self/ns/pid")),
        pid=os.getpid(),
        born=_process(os.getpid())[1],
        job=os.environ.get("SLURM_JOB_ID", ""),
        life=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        launch=os.environ.get("TORCHELASTIC_RUN_ID", ""),
        restart=int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0),
        token=uuid.uuid4().hex,
    )


class RunLock:
    """The lock of one run directory. `acquire` and `release` are for one process of a job, rank 0."""

    def __init__(
        self,
        directory: str | Path,
        command: str,
        *,
        me: Holder | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], object] = time.sleep,
        on_lost: Callable[[str], None] | None = None,
        flock: Callable[[int, int], None] = fcntl.flock,
    ) -> None:
        """`on_lost`: called with the line when another job has taken the run over (default: say it and end the process with 2).

        The others stand for the machine in tests.
        """
        self.directory, self.me = Path(directory), me or this_process(command)
        self._clock, self._sleep, self._flock = clock, sleep, flock
        self._on_lost = on_lost or _end
        self._path: Path | None = None
        self._file = -1
        self._watched: dict[_Found, tuple[float, float]] = {}  # silence so far, and enough of it, in seconds
        self._races = 0  # that other starters won
        self._newer: _Found | None = None  # than ours, at the last heartbeat
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def held(self) -> bool:
        return self._path is not None

    def acquire(self) -> None:
        """Take the lock; the directory is made where it is missing.

        Raises UserError where another job holds it, or the directory cannot be written.
        """
        while not self.attempt():
            pass

    def attempt(self) -> bool:
        """A part of `acquire` that takes little more than BEAT seconds; whether the lock is held now."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not self._try():
                return False
        except OSError as error:
            raise UserError(f"checkpoint.directory: {self.directory} cannot be written: {error.strerror}") from error
        _LOCKS.add(self)
        self._thread = threading.Thread(target=self._keep, name="run-lock", daemon=True)
        self._thread.start()
        return True

    def release(self) -> None:
        """Give the lock back; nothing happens where it is not held."""
        if self._path is None:
            return
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(BEAT)
        path, self._path = self._path, None
        with suppress(OSError):
            if self._is_mine(path):
                path.unlink()
        self._close()

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def beat(self) -> None:
        """One heartbeat; `on_lost` is called where the lock is another's by now."""
        path = self._path
        if path is None:
            return
        try:
            if self._is_mine(path) and not self._taken_over(path):
                os.utime(self._file, (self._clock(), self._clock()))
                return
        except OSError:  # the file system does not answer now; the next heartbeat may get through
            return
        try:
            others = self._found()
            who = str(others[-1].holder) if others else "nobody: its lock file was removed"
        except OSError as error:
            who = f"an unknown job: {error.strerror}"
        if self._stop.is_set():  # released meanwhile
            return
        self._path = None
        self._on_lost(f"{self.directory}: this job does not hold the run any more; it is held by {who}")

    def _taken_over(self, path: Path) -> bool:
        """Whether the holder of a newer lock file beats; one that nobody beats on is of a starter that is stepping back."""
        before, found = self._newer, self._found()
        self._newer = found[-1] if found and found[-1].path != path else None
        if before is None or self._newer is None:
            return False
        return before.path == self._newer.path and before.beat != self._newer.beat

    def _keep(self) -> None:
        while not self._stop.wait(BEAT):
            self.beat()

    def _is_mine(self, path: Path) -> bool:
        """Whether the file at `path` is the one that this process made."""
        try:
            there, mine = path.stat(), os.fstat(self._file)
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def _try(self) -> bool:
        """One attempt; False: look again, something changed. Raises UserError where the lock is held."""
        found = self._found()
        if unknown := [lock for lock in reversed(found) if not self._is_dead(lock)]:
            self._watch(unknown)
            return False
        dead = {(lock.path, lock.holder) for lock in found}
        path = self.directory / f"{_NAME}.{max((_number(lock.path) for lock in found), default=0) + 1}"
        if not self._make(path):
            self._lost_race()
            return False
        others = [lock for lock in self._found() if lock.path != path]
        if any((lock.path, lock.holder) not in dead for lock in others):
            with suppress(OSError):
                path.unlink()
            self._close()
            self._lost_race()
            return False
        for lock in others:
            with suppress(OSError):
                lock.path.unlink()
        self._path = path
        return True

    def _lost_race(self) -> None:
        self._races += 1
        if self._races == _TRIES:
            raise UserError(f"{self.directory}: other jobs are starting here; start again when they have ended")

    def _make(self, path: Path) -> bool:
        """Make the lock file, whole; False where another process did before."""
        part = self.directory / f".{_NAME}.{self.me.token}.part"
        try:
            self._file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            self._fill()
            try:
                os.link(part, path)
                return True
            except OSError as error:
                if os.fstat(self._file).st_nlink == 2:  # the answer of a network file system was lost
                    return True
                if error.errno == errno.EEXIST:
                    self._close()
                    return False
                if error.errno not in _NO_LINKS:
                    raise
        except OSError:
            self._close()
            raise
        finally:
            with suppress(OSError):
                part.unlink()
        self._close()
        try:  # a file system without hard links; a reader may see the file before it is filled
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            return False
        try:
            self._fill()
        except OSError:
            with suppress(OSError):
                path.unlink()
            self._close()
            raise
        return True

    def _fill(self) -> None:
        locked = True
        try:
            self._flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            locked = False
        now = self._clock()
        text = json.dumps({**asdict(self.me), "started": now, "flock": locked}, indent=1) + "\n"
        os.write(self._file, text.encode())
        os.fsync(self._file)
        os.utime(self._file, (now, now))

    def _paths(self) -> list[Path]:
        return sorted((p for p in self.directory.iterdir() if re.fullmatch(rf"{_NAME}\.\d+", p.name)), key=_number)

    def _found(self) -> list[_Found]:
        """The lock files that are there, oldest number first."""
        return [found for found in map(_read_lock, self._paths()) if found is not None]

    def _is_dead(self, lock: _Found) -> bool:
        """Whether the holder is known to be dead, by now; where that is not known yet it is to be watched.

        Raises UserError where the holder lives.
        """
        holder, free = lock.holder, None
        if holder.boot and holder.boot == self.me.boot:
            free = self._kernel_says_free(lock.path) if holder.flock else None
            seen = bool(holder.pids) and holder.pids == self.me.pids  # though /proc may hide other users' processes
            if free is False or (seen and _runs(holder)):
                raise UserError(self._refusal(lock))
            if seen:
                return True
        if lock not in self._watched:
            enough = WATCH
            if not free and not holder.is_earlier_life_of(self.me):  # a network file system may lose the kernel's lock
                # Clocks may disagree: LIMIT seconds of silence are enough, whatever time the last heartbeat bears.
                enough = max(WATCH, min(LIMIT, LIMIT - (self._clock() - lock.beat)) + BEAT)
            self._watched[lock] = 0.0, enough
            host = holder.host or "an unknown host"
            log.warning("%s: waiting up to %.0f s for the lock of %s", self.directory, enough, host)
        silent, enough = self._watched[lock]
        return silent >= enough

    def _watch(self, locks: list[_Found]) -> None:
        """One heartbeat long. Raises UserError where a holder gives a sign of life."""
        self._sleep(BEAT)
        for lock in locks:
            again = _read_lock(lock.path)
            if again is not None and again != lock:
                raise UserError(self._refusal(again))
            silent, enough = self._watched[lock]
            self._watched[lock] = silent + BEAT, enough

    def _kernel_says_free(self, path: Path) -> bool | None:
        """Whether nobody holds the kernel's lock on a file that was made on this machine; None where it does not say."""
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            self._flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that ask at once do not see one another
        except BlockingIOError:
            return False
        except OSError:
            return None
        finally:
            os.close(file)
        return True

    def _refusal(self, lock: _Found) -> str:
        ago = max(0.0, self._clock() - lock.beat)
        since = (
            datetime.fromtimestamp(lock.holder.started).strftime("%Y-%m-%d %H:%M:%S") if lock.holder.started else "?"
        )
        return (
            f"{self.directory}: the run is held by {lock.holder}, since {since}, last sign of life {ago:.0f} s ago; wait until "
            f"it has ended, or choose another checkpoint.directory (the lock of a job that died is taken "
            "over)"
        )

    def _forget(self) -> None:
        """In a forked child: the kernel's lock is the parent's alone, and ends with it."""
        self._path, self._thread = None, None
        self._close()

    def _close(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            with suppress(OSError):
                os.close(file)


_LOCKS: weakref.WeakSet[RunLock] = weakref.WeakSet()  # of this process


def _forget_all() -> None:
    for lock in list(_LOCKS):
        lock._forget()


os.register_at_fork(after_in_child=_forget_all)


@contextmanager
def held(directory: str | Path, command: str) -> Iterator[None]:
    """While it lasts this job, and no other, may write to the run's `directory`. Collective.

    Raises UserError on all ranks where another job holds it, before anything is touched.
    """
    from megatron_ssu.engine.ranks import on_rank_zero  # late: it imports torch

    lock = RunLock(directory, command)
    while not on_rank_zero(lock.attempt):  # step by step: other ranks' wait for rank 0 has a time limit
        pass
    try:
        yield
    finally:
        lock.release()


def _read_lock(path: Path) -> _Found | None:
    """A lock file; None where it is gone. One without readable content has a holder that nothing is known of."""
    try:
        with path.open("rb") as stream:  # opened anew: network file systems answer with old times otherwise
            content, beat = stream.read(), os.fstat(stream.fileno()).st_mtime
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise
    try:
        return _Found(path, Holder(**json.loads(content)), beat)
    except (ValueError, TypeError):
        return _Found(path, Holder(), beat)


def _runs(holder: Holder) -> bool:
    """Whether the holder's process, of this machine and namespace, is there; another process may have its number."""
    state, born = _process(holder.pid)
    return state not in ("", "Z", "X") and born == holder.born


def _process(pid: int) -> tuple[str, int]:
    """State of a process and when it began, in clock ticks since the machine did; ('', 0) where there is none."""
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()  # the name before may have blanks
    return (fields[0], int(fields[19])) if len(fields) > 19 else ("", 0)


def _number(path: Path) -> int:
    return int(path.name.rpartition(".")[2])


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _end(line: str) -> None:
    """Two jobs must not write to one run: print it on standard error and end the process at once."""
    try:
        print_error(f"megatron-ssu: {line}; ended before it does harm")
    finally:
        os._exit(2)
