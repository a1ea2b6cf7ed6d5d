"""`prepare`: JSONL text to an indexed dataset (PREFIX.bin, PREFIX.idx) with a note beside it (PREFIX.json)."""

from __future__ import annotations

import fcntl
import json
import logging
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from types import FrameType
from typing import BinaryIO

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from megatron_ssu.config.sources import PLAIN, Reading
from megatron_ssu.data.indexed import bin_path, check_prefix, idx_path, loss_path, meta_path, prepared_prefix
from megatron_ssu.data.rows import Rows, is_hub_id, is_table, open_rows, rows_digest, size_of
from megatron_ssu.data.tokenize_worker import Batch, Encoded, EncodeJob, encode_batch, encode_file, start_process
from megatron_ssu.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ssu.errors import UserError, one_line

__all__ = ["PrepareReport", "Terminated", "check_prefix", "prepare", "prepared_prefix"]

logger = logging.getLogger(__name__)

_BATCH_LINES, _BATCH_BYTES = 256, 1 << 19
_Submit = Callable[[Batch], Callable[[], Encoded]]  # the result is asked for later, in the order of the lines
_LOCK = "lock"  # in a workspace
_BEGINNING = 3600.0  # seconds; a process takes far less to make its lock file
_SMALL_INPUT = 4 << 20  # below it starting processes takes longer than tokenizing


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did."""

    prefix: Path
    documents: int
    tokens: int  # documents' begins and ends included
    skipped: int  # bad lines left out
    empty: int  # documents without a token, left out
    bytes: int  # of the source files on disk


class Terminated(SystemExit):
    """SIGTERM while preparing; exits with the status that a shell shows for it."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


def prepare(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    model_path: str | Path,
    *,
    trust_remote_code: bool = False,
    document_end: str | None = None,
    workers: int = 2,
    reading: Reading = PLAIN,
    append_eod: bool = True,
    skip_bad_lines: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    progress: bool = True,
    small_input: int = _SMALL_INPUT,
) -> PrepareReport:
    """Tokenize the documents of `inputs`, in order, with the tokenizer in `model_path`.

    A document of plain text begins as the tokenizer begins a text (bos, where it writes one) and ends with `document_end`
    (see `Tokenizer.document_end`); a chat is as its template writes it.

    `workers` processes share the work (none are started below `small_input` bytes); the files do not depend on their
    number. They appear under their names when complete and not before, whatever ends the work.
    Raises UserError: bad input or line (file and line named), output that exists or cannot be written.
    """
    paths, prefix = [Path(p) for p in inputs], Path(output_prefix)
    total = _check_inputs(paths, prefix, workers, overwrite)
    tokenizer = load_tokenizer(model_path, trust_remote_code=trust_remote_code, document_end=document_end)
    job = EncodeJob(
        str(model_path),
        trust_remote_code,
        reading,
        begin=tuple(tokenizer.document_begin),
        end=tokenizer.document_end if append_eod else None,
        turn_end=tokenizer.eos_id,
        skip_bad_lines=skip_bad_lines,
    )
    sources = [{"name": p.name, "bytes": size_of(p), "sha256": rows_digest(p, reading)} for p in paths]
    with _terminate_as_exception(), _workspace(prefix) as folder:
        try:
            builder = IndexedDatasetBuilder(str(folder / "data.bin"), DType.optimal_dtype(tokenizer.vocab_size))
            with builder.data_file, _pool(1 if total < small_input else workers, job, folder) as submit:
                show = console if progress and console is not None and console.is_terminal else None
                with _loss_file(folder, reading) as loss:
                    report = _run(paths, prefix, job, submit, max(2, 2 * workers), builder, loss, show, total)
                builder.finalize(str(folder / "data.idx"))
            note = {**asdict(report), "prefix": prefix.name, "sources": sources, **_note(job, tokenizer, builder.dtype)}
            (folder / "data.json").write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
            _publish(folder, prefix)
        except BrokenProcessPool as error:
            raise UserError(
                f"{prefix}: a tokenizer process died (out of memory?), nothing was written; try fewer workers"
            ) from error
        except OSError as error:  # reading errors are UserErrors already
            raise UserError(f"{bin_path(prefix)}: cannot be written ({error.strerror or one_line(error)})") from error
    return report


def _note(job: EncodeJob, tokenizer: Tokenizer, dtype: type) -> dict[str, object]:
    return {
        "tokenizer": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "document_begin": list(job.begin),
        "document_end": job.end,
        "eos": tokenizer.eos_id,
        "text_key": job.reading.text_key,
        **({"reading": job.reading.choices()} if job.reading.choices() else {}),
        "dtype": np.dtype(dtype).name,
    }


def _check_inputs(paths: list[Path], prefix: Path, workers: int, overwrite: bool) -> int:
    """Sum of the input sizes in bytes."""
    if not paths:
        raise UserError("prepare: no input files")
    if workers < 1:
        raise UserError(f"workers: {workers}; at least 1 is needed")
    for path in paths:
        if not path.is_file() and not is_table(path) and not is_hub_id(path):
            raise UserError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    existing = [f for f in (bin_path(prefix), idx_path(prefix), meta_path(prefix), loss_path(prefix)) if f.exists()]
    if existing and not overwrite:
        raise UserError(f"{existing[0]}: exists already; remove it, choose another output or ask for --overwrite")
    return sum(size_of(p) for p in paths)


def _run(
    paths: list[Path],
    prefix: Path,
    job: EncodeJob,
    submit: _Submit,
    in_flight: int,
    builder: IndexedDatasetBuilder,
    loss: BinaryIO | None,
    console: Console | None,
    total: int,
) -> PrepareReport:
    """Feed the batches, at most `in_flight` at once, and write the results in the order of the lines."""
    documents = tokens = skipped = empty = read_before = 0
    with _progress(console, total) as advance:
        for path in paths:
            reader, lines = open_rows(path, job.reading), 0
            pending: deque[Callable[[], Encoded]] = deque()
            batches = _batches(reader)
            while True:
                for batch in batches:
                    lines += len(batch)
                    pending.append(submit(batch))
                    if len(pending) >= in_flight:
                        break
                if not pending:
                    break
                encoded = _result(pending.popleft(), path)
                if encoded.first_bad is not None:
                    _complain(path, encoded, job, logged=skipped)
                for ids, mask in zip(encoded.documents, encoded.masks, strict=True):
                    builder.add_document(np.asarray(ids), [len(ids)])
                    tokens += len(ids)
                    if loss is not None:
                        loss.write(b"\1" * len(ids) if mask is None else mask)
                documents += len(encoded.documents)
                skipped += encoded.skipped
                empty += encoded.empty
                advance(read_before + reader.bytes_read, documents, tokens)
            if not lines:
                raise UserError(f"{path}: no documents in it")
            read_before += size_of(path)
    if not documents:
        names = ", ".join(map(str, paths))
        raise UserError(f"{names}: no documents left ({skipped} bad lines skipped, {empty} without a token)")
    return PrepareReport(prefix, documents, tokens, skipped, empty, total)


def _batches(reader: Rows) -> Iterator[Batch]:
    batch: Batch = []
    size = 0
    for number, line in reader:
        batch.append((number, line))
        size += len(line)
        if len(batch) == _BATCH_LINES or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _result(pending: Callable[[], Encoded], path: Path) -> Encoded:
    try:
        return pending()
    except BrokenProcessPool:
        raise
    except RuntimeError as error:
        raise UserError(f"{path}: {one_line(error)}") from error


def _complain(path: Path, encoded: Encoded, job: EncodeJob, *, logged: int) -> None:
    assert encoded.first_bad is not None
    number, message = encoded.first_bad
    if not job.skip_bad_lines:
        raise UserError(f"{path}:{number}: {message}")
    if not logged:
        logger.warning("%s:%d: %s (skipped; further bad lines are only counted)", path, number, message)


@contextmanager
def _loss_file(folder: Path, reading: Reading) -> Iterator[BinaryIO | None]:
    """Where the documents' masks are written, a byte per token; None where there is loss on every token."""
    if reading.loss_on == "all":
        yield None
        return
    with (folder / "data.loss").open("wb") as file:
        yield file


@contextmanager
def _pool(workers: int, job: EncodeJob, folder: Path) -> Iterator[_Submit]:
    """A `submit` that works in `workers` processes, by files in `folder`, or in this process when that is 1."""
    if workers == 1:
        yield lambda batch: lambda: encode_batch(job, batch)
        return
    # spawn: forking a process that runs threads, as torch's and the tokenizer's, may hang the child
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=start_process)
    names = (folder / f"batch-{n}" for n in count())

    def submit(batch: Batch) -> Callable[[], Encoded]:
        name = next(names)
        name.write_bytes(pickle.dumps(batch))
        future = executor.submit(encode_file, job, name)

        def result() -> Encoded:
            future.result()
            encoded: Encoded = pickle.loads(name.read_bytes())
            name.unlink()
            return encoded

        return result

    try:
        yield submit
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _progress(console: Console | None, total: int) -> Iterator[Callable[[int, int, int], None]]:
    """A function of (bytes read, documents, tokens) that moves the bar; it does nothing without a console."""
    if console is None:
        yield lambda *_: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task: TaskID = bar.add_task("tokenizing", total=total)

        def advance(done: int, documents: int, tokens: int) -> None:
            bar.update(task, completed=done, description=f"{documents:,} documents, {tokens:,} tokens")

        yield advance


@contextmanager
def _terminate_as_exception() -> Iterator[None]:
    """SIGTERM unwinds the stack, so that temporary files go. Only the main thread may set handlers."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def terminate(signum: int, frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _workspace(prefix: Path) -> Iterator[Path]:
    """A hidden folder beside the output (so that renaming is atomic), gone afterwards.

    Its process holds a lock on a file in it: folders of this host whose lock is free were left by processes that were
    killed outright, and go. (A process number would not do: containers have the same host name and their own numbers.)
    """
    host = socket.gethostname()
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        # The whole name: other hosts' names may begin with ours.
        ours = re.compile(rf"\.{re.escape(prefix.name)}\.{re.escape(host)}-\d+(-\w{{8}})?\.tmp")
        for stale in prefix.parent.iterdir():
            if ours.fullmatch(stale.name) and _left_behind(stale):
                shutil.rmtree(stale, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(".tmp", f".{prefix.name}.{host}-{os.getpid()}-", prefix.parent))
        lock = (folder / f"{_LOCK}.new").open("w")
        with suppress(OSError):  # a file system without locks: then nobody removes the folder but its process
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(lock.name, folder / _LOCK)  # locked when it appears
    except OSError as error:
        raise UserError(f"{prefix.parent}: cannot be written ({error.strerror})") from error
    with lock:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _left_behind(folder: Path) -> bool:
    """True if no process of this host is at work in the workspace. One without a lock file has just begun, unless it is old."""
    try:
        with (folder / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except FileNotFoundError:
        with suppress(OSError):
            return time.time() - folder.stat().st_mtime > _BEGINNING
        return False
    except OSError:
        return False


def _publish(folder: Path, prefix: Path) -> None:
    """Rename into place; the .idx comes last, for without it there is no dataset."""
    for file in folder.iterdir():
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    idx_path(prefix).unlink(missing_ok=True)  # an old index must not meet new data
    try:
        loss_path(prefix).unlink(missing_ok=True)
        if (folder / "data.loss").exists():
            os.replace(folder / "data.loss", loss_path(prefix))
        os.replace(folder / "data.bin", bin_path(prefix))
        os.replace(folder / "data.json", meta_path(prefix))
        os.replace(folder / "data.idx", idx_path(prefix))
    except BaseException:  # a signal between two of them
        if not idx_path(prefix).exists():
            bin_path(prefix).unlink(missing_ok=True)
            loss_path(prefix).unlink(missing_ok=True)
            meta_path(prefix).unlink(missing_ok=True)
        raise
