"""One job per run directory: who holds it, who is dead, and that a takeover has one winner."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ssu.errors import UserError
from megatron_ssu.train import run_lock
from megatron_ssu.train.run_lock import BEAT, LIMIT, Holder, RunLock, held, this_process

ROOT = Path(__file__).resolve().parents[2]


class Machine:
    """A machine's clock; what happens while it sleeps."""

    def __init__(self, now: float = 1e9) -> None:
        self.now, self.slept = now, 0.0
        self.meanwhile = lambda: None

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds
        self.meanwhile()


def no_flock(file: int, how: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def lock_of(directory, machine, *, flock=no_flock, command="train", **who) -> RunLock:
    me = replace(this_process(command), **who)
    return RunLock(directory, command, me=me, clock=lambda: machine.now, sleep=machine.sleep, flock=flock)


def files(directory) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


OTHER = {"host": "node7", "boot": "another", "pids": "", "pid": 77}


@pytest.fixture
def machine():
    return Machine()


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)


def abandon(lock: RunLock) -> None:
    """Its process died: no heartbeat, no kernel's lock, the file stays."""
    lock._stop.set()
    lock._thread.join()
    lock._forget()


@pytest.mark.parametrize("flock", [fcntl.flock, no_flock])
def test_a_second_job_is_refused_until_the_first_has_ended(tmp_path, machine, flock):
    first = lock_of(tmp_path / "run", machine, flock=flock, command="score", job="4711")
    first.acquire()
    assert first.held and files(tmp_path / "run") == ["run.lock.1"]
    machine.now += 12
    second = lock_of(tmp_path / "run", machine, flock=flock)
    with pytest.raises(UserError) as caught:
        second.acquire()
    line = str(caught.value)
    for word in ("`score`", f"process {os.getpid()}", "SLURM job 4711", "12 s ago", first.me.host):
        assert word in line
    assert "\n" not in line and not second.held and files(tmp_path / "run") == ["run.lock.1"]
    second.release()  # not its own
    first.release()
    assert files(tmp_path / "run") == []
    second.acquire()
    second.release()
    assert machine.slept == 0


@pytest.mark.parametrize("flock", [fcntl.flock, no_flock])
def test_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path, machine, flock):
    born = this_process("train").born
    gone = subprocess.Popen(["true"])
    gone.wait()
    for who in ({"pid": gone.pid}, {"born": born + 1}):  # nobody there; somebody else has its number
        dead = lock_of(tmp_path, machine, flock=flock, **who)
        dead.acquire()
        abandon(dead)
        fresh = lock_of(tmp_path, machine, flock=flock)
        fresh.acquire()
        assert files(tmp_path) == ["run.lock.2"] and machine.slept == 0
        fresh.release()
        assert files(tmp_path) == []


def test_the_kernel_knows_a_holder_in_another_container(tmp_path, machine):
    """Its process number means nothing here: one namespace's 1 is not the other's."""
    first = lock_of(tmp_path, machine, flock=fcntl.flock, pids="pid:[1]", pid=1, host="a")
    first.acquire()
    machine.now += 10 * LIMIT  # its heartbeat thread beats in real time
    second = lock_of(tmp_path, machine, flock=fcntl.flock, pids="pid:[2]", pid=1, host="a")
    with pytest.raises(UserError, match="held by"):
        second.acquire()
    abandon(first)
    second.acquire()
    assert machine.slept == run_lock.WATCH  # a network file system may have lost the lock of one that lives
    second.release()


def test_another_namespace_without_flock_is_judged_by_its_heartbeat(tmp_path, machine):
    lock = lock_of(tmp_path, machine, pids="pid:[1]", pid=1)
    lock.acquire()
    abandon(lock)
    fresh = lock_of(tmp_path, machine)
    fresh.acquire()
    assert LIMIT < machine.slept <= LIMIT + run_lock.WATCH
    fresh.release()


@pytest.mark.parametrize("age,slept", [(-9999, 190), (0, 190), (100, 90), (LIMIT + 1, 30)])
def test_another_host_is_dead_when_its_heartbeat_is_old_and_stays_so(age, slept, tmp_path, machine, caplog):
    dead = lock_of(tmp_path, machine, **OTHER)
    dead.acquire()
    abandon(dead)
    machine.now += age
    fresh = lock_of(tmp_path, machine)
    fresh.acquire()
    assert machine.slept == slept and files(tmp_path) == ["run.lock.2"]
    assert [r.getMessage() for r in caplog.records] == [f"{tmp_path}: waiting up to {slept} s for the lock of node7"]
    fresh.release()


def test_several_dead_locks_are_watched_at_once(tmp_path, machine):
    for number in (1, 2, 3):
        dead = lock_of(tmp_path / str(number), machine, **OTHER)
        dead.acquire()
        abandon(dead)
        (tmp_path / str(number) / "run.lock.1").rename(tmp_path / f"run.lock.{number}")
        (tmp_path / str(number)).rmdir()
    fresh = lock_of(tmp_path, machine)
    attempts = 0
    while not fresh.attempt():
        attempts += 1
        assert machine.slept == attempts * BEAT, "no attempt takes longer than a heartbeat"
    assert machine.slept == LIMIT + BEAT and files(tmp_path) == ["run.lock.4"]
    fresh.release()


def test_clocks_that_disagree_end_no_job(tmp_path, machine):
    behind = Machine(machine.now - 10 * LIMIT)
    alive = lock_of(tmp_path, behind, **OTHER)
    alive.acquire()

    def meanwhile():
        behind.now += BEAT
        alive.beat()

    machine.meanwhile = meanwhile
    with pytest.raises(UserError, match="node7"):
        lock_of(tmp_path, machine).acquire()
    assert alive.held and files(tmp_path) == ["run.lock.1"]
    alive.release()


def test_a_requeued_slurm_job_takes_over_its_earlier_life(tmp_path, machine):
    before = lock_of(tmp_path, machine, **OTHER, job="12", life=0)
    before.acquire()
    machine.meanwhile = before.beat
    for life, job in ((0, "12"), (1, "13")):  # another step of the same life; another job
        with pytest.raises(UserError, match="SLURM job 12"):
            lock_of(tmp_path, machine, job=job, life=life).acquire()
    # its end is not there yet
    with pytest.raises(UserError, match="SLURM job 12"):
        lock_of(tmp_path, machine, job="12", life=1).acquire()
    machine.meanwhile = lambda: None
    abandon(before)
    after = lock_of(tmp_path, machine, job="12", life=1)
    after.acquire()
    assert after.held
    after.release()


@pytest.mark.parametrize(
    "was,now,earlier",
    [
        ({"launch": "a", "restart": 0}, {"launch": "a", "restart": 1}, True),
        ({"launch": "a", "restart": 1}, {"launch": "a", "restart": 1}, False),
        ({"launch": "a", "restart": 0}, {"launch": "b", "restart": 1}, False),
        ({"launch": "none", "restart": 0}, {"launch": "none", "restart": 1}, False),
        ({"launch": "none", "restart": 0, "job": "1"}, {"launch": "none", "restart": 1, "job": "1"}, True),
        ({"job": "1", "restart": 0}, {"job": "1", "restart": 1}, False),
        ({"job": "1", "launch": "a"}, {"job": "1", "launch": "b"}, False),
    ],
)
def test_an_earlier_life_is_known_by_its_launch(was, now, earlier):
    assert Holder(**was).is_earlier_life_of(Holder(**now)) == earlier


def test_the_thread_is_silent_after_release_and_ends_where_nothing_can_be_read(tmp_path, machine, monkeypatch):
    said = []
    lock = lock_of(tmp_path, machine)
    lock._on_lost = said.append
    lock.acquire()
    (tmp_path / "run.lock.1").unlink()
    stale = OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def fail(*arguments):
        raise stale

    monkeypatch.setattr(Path, "open", fail)
    assert run_lock._read_lock(tmp_path / "run.lock.1") is None
    monkeypatch.setattr(lock, "_found", fail)
    lock._stop.set()
    lock.beat()
    assert not said
    lock._stop.clear()
    lock.beat()
    assert len(said) == 1 and stale.strerror in said[0]


def test_of_many_starters_one_takes_over(tmp_path):
    """The lock of a dead job on another host; all judge it dead before any of them acts."""
    machine = Machine()
    for _ in range(10):
        dead = lock_of(tmp_path, machine, **OTHER)
        dead.acquire()
        abandon(dead)
        machine.now += 2 * LIMIT
        count = 6
        barrier = threading.Barrier(count)
        done = []

        def start(barrier=barrier, done=done):
            lock = lock_of(tmp_path, Machine(machine.now))
            judged, first = lock._is_dead, []

            def judge(found):
                answer = judged(found)
                if not first:
                    first.append(True)
                    barrier.wait(10)
                return answer

            lock._is_dead = judge
            with contextlib.suppress(UserError):
                lock.acquire()
            done.append(lock)

        threads = [threading.Thread(target=start) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [lock for lock in done if lock.held]
        assert len(done) == count and len(winners) == 1
        assert files(tmp_path) == ["run.lock.2"]
        winners[0].release()
        assert files(tmp_path) == []


def test_a_late_starter_does_not_remove_a_new_lock_of_the_same_number(tmp_path, machine):
    dead = lock_of(tmp_path, machine, **OTHER)
    dead.acquire()
    abandon(dead)
    machine.now += 2 * LIMIT
    late, new = lock_of(tmp_path, machine), lock_of(tmp_path, machine)
    make = late._make

    def late_make(path):
        """Meanwhile another job took over and ended, and a third began, under the dead one's number."""
        late._make = make
        for file in tmp_path.glob("run.lock.*"):
            file.unlink()
        new.acquire()
        assert files(tmp_path) == ["run.lock.1"]
        return make(path)

    late._make = late_make
    with pytest.raises(UserError, match="held by"):
        late.acquire()
    assert new.held and files(tmp_path) == ["run.lock.1"]
    new.release()


def test_a_holder_whose_kernel_lock_was_lost_still_lives(tmp_path, machine):
    """As on NFS after a lease ran out."""
    first = lock_of(tmp_path, machine, flock=lambda file, how: None)
    first.acquire()
    with pytest.raises(UserError, match=f"process {os.getpid()}"):
        lock_of(tmp_path, machine, flock=fcntl.flock).acquire()
    first.release()


@pytest.mark.parametrize("links", [True, False])
def test_a_full_disk_leaves_no_half_lock(links, tmp_path, machine, monkeypatch):
    lock = lock_of(tmp_path, machine, flock=fcntl.flock)
    fill, calls = lock._fill, []

    def full():
        calls.append(None)
        fill()
        if len(calls) == (1 if links else 2):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    lock._fill = full
    if not links:
        monkeypatch.setattr(run_lock, "_NO_LINKS", (errno.EPERM,))
        monkeypatch.setattr(
            run_lock.os, "link", lambda *paths: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no"))
        )
    with pytest.raises(UserError, match="No space left on device"):
        lock.acquire()
    assert files(tmp_path) == [] and lock._file == -1
    lock._fill = fill
    lock.acquire()
    lock.release()


def test_without_hard_links(tmp_path, machine, monkeypatch):
    def link(*paths):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(run_lock.os, "link", link)
    first = lock_of(tmp_path, machine)
    first.acquire()
    with pytest.raises(UserError, match="held by"):
        lock_of(tmp_path, machine).acquire()
    first.release()
    assert files(tmp_path) == []


def test_a_lock_that_cannot_be_read_is_judged_by_its_heartbeat(tmp_path, machine):
    (tmp_path / "run.lock.3").write_text('{"command": "tr')
    os.utime(tmp_path / "run.lock.3", (machine.now, machine.now))
    machine.meanwhile = lambda: os.utime(tmp_path / "run.lock.3", (machine.now, machine.now))
    with pytest.raises(UserError, match="unknown host"):
        lock_of(tmp_path, machine).acquire()
    machine.meanwhile = lambda: None
    lock = lock_of(tmp_path, machine)
    lock.acquire()
    assert files(tmp_path) == ["run.lock.4"]
    lock.release()


def test_a_job_that_lost_its_lock_ends(tmp_path, machine):
    said = []
    slow = lock_of(tmp_path, machine, **OTHER)
    slow._on_lost = said.append
    slow.acquire()
    slow.beat()
    assert not said
    machine.now += LIMIT + 1  # it was stopped, or its file system did not answer
    fresh = lock_of(tmp_path, machine)
    fresh.acquire()
    slow.beat()
    assert len(said) == 1 and f"process {os.getpid()}" in said[0] and not slow.held
    slow.release()
    assert fresh.held and files(tmp_path) == ["run.lock.2"]
    fresh.release()


def test_a_job_whose_lock_could_not_be_removed_ends_too(tmp_path, machine, monkeypatch):
    """Its file is another user's in a directory with the sticky bit, for example."""
    said = []
    slow = lock_of(tmp_path, machine, **OTHER)
    slow._on_lost = said.append
    slow.acquire()
    machine.now += LIMIT + 1
    fresh, unlink = lock_of(tmp_path, machine), Path.unlink

    def refuse(self, missing_ok=False):
        if self.name == "run.lock.1":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        fresh.acquire()
    assert files(tmp_path) == ["run.lock.1", "run.lock.2"]
    for _ in range(2):
        assert not said
        slow.beat()
        machine.now += BEAT
        fresh.beat()
    slow.beat()
    assert len(said) == 1 and fresh.held and not slow.held
    fresh.release()


def test_a_starter_that_steps_back_or_dies_meanwhile_ends_no_job(tmp_path, machine):
    said = []
    holder = lock_of(tmp_path, machine)
    holder._on_lost = said.append
    holder.acquire()
    (tmp_path / "run.lock.2").write_text((tmp_path / "run.lock.1").read_text())
    for _ in range(4):
        machine.now += BEAT
        holder.beat()
    assert holder.held and not said
    (tmp_path / "run.lock.2").unlink()
    holder.release()
    assert files(tmp_path) == []


def test_a_process_that_is_hidden_lives_by_its_kernel_lock(tmp_path, machine, monkeypatch):
    """Another user's, where /proc is mounted with hidepid."""
    first = lock_of(tmp_path, machine, flock=fcntl.flock)
    first.acquire()
    monkeypatch.setattr(run_lock, "_process", lambda pid: ("", 0))
    with pytest.raises(UserError, match="held by"):
        lock_of(tmp_path, machine, flock=fcntl.flock).acquire()
    first.release()


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"checkpoint.directory: .*file/run cannot be written"),
        held(tmp_path / "file" / "run", "x"),
    ):
        pass


def test_an_error_gives_the_lock_back(tmp_path):
    with pytest.raises(ZeroDivisionError), held(tmp_path, "train"):
        assert files(tmp_path) == ["run.lock.1"]
        raise ZeroDivisionError
    assert files(tmp_path) == []


HOLD = """
import os, sys, time
from megatron_ssu.train.run_lock import RunLock
RunLock(sys.argv[1], "train").acquire()
if os.fork() == 0:  # as a loader process, which outlives its rank for a while
    print("held", flush=True)
time.sleep(60)
"""
TRY = """
import sys
from megatron_ssu.train.run_lock import RunLock
from megatron_ssu.errors import UserError
lock = RunLock(sys.argv[1], "train")
try:
    lock.acquire()
    print("held")
except UserError as error:
    print(error)
lock.release()
"""


def test_two_processes(tmp_path):
    """Refused while the first lives, at once after it was killed outright, though a child of it lives on."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def attempt() -> str:
        command = [sys.executable, "-c", TRY, str(tmp_path / "run")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120).stdout

    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert first.stdout.readline() == "held\n"
        assert f"process {first.pid}" in attempt()
        assert Holder(**json.loads((tmp_path / "run" / "run.lock.1").read_text())).flock
        os.kill(first.pid, signal.SIGKILL)
        first.wait(20)
        assert attempt() == "held\n"
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.stdout.close()
    assert files(tmp_path / "run") == []
