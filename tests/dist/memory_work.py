"""What the ranks of the checkpoint memory test do: save and load, and measure this process."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_ssu.models.hf_export import export_model
from megatron_ssu.models.hf_import import import_weights
from megatron_ssu.models.parallel_model import open_model
from megatron_ssu.shield.shield_file import load_shield
from megatron_ssu.train.checkpoints import Checkpoints, Progress
from megatron_ssu.train.identity import Identity
from megatron_ssu.train.trainer import Trainer
from tests.dist import resume_work
from tests.dist.work import RandomTokens, mesh, run_config

_RESET_PEAK = Path("/proc/self/clear_refs")


def can_measure() -> bool:
    try:
        _RESET_PEAK.write_text("5")
    except OSError:
        return False
    return True


def _status(key: str) -> int:
    """Bytes, from this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def _peak(work: Callable[[], Any]) -> int:
    """Bytes by which the resident memory rises at most while `work` runs."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # memory that was used before would hide what is used now
    before = _status("VmRSS")
    _RESET_PEAK.write_text("5")
    work()
    return _status("VmHWM") - before


def _live() -> int:
    """Bytes of all CPU tensors, those in reference cycles that wait to be collected among them."""
    tensors = [
        o for o in gc.get_objects() if isinstance(o, torch.Tensor) and type(o) in (torch.Tensor, torch.nn.Parameter)
    ]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    return sum(storages.values())


def measure(model: str, shield: str, directory: str, background: bool) -> dict[str, int]:
    """Bytes on this rank: peaks over a save and a load, tensors left behind by each, and the parameters' number."""
    run = resume_work.make_run(model, mesh(), directory, "bf16")
    session = open_model(run)
    trainer = Trainer(session, load_shield(shield))
    trainer.step(trainer.batches(RandomTokens(), 0))
    trainer.gather_weights()
    checkpoints = Checkpoints(directory, background=background)

    def save() -> None:
        checkpoints.save(session, Progress(iteration=1), Identity({}), trainer.optimizer_state, trainer.method)
        checkpoints.finish()

    def load() -> None:
        checkpoints.load(1, session, Identity({}), trainer.optimizer_state, trainer.method)

    compact = {p for weight in trainer.compact.compact.values() for p in weight.params}
    found = {"parameters": sum(p.numel() for p in session.chunks[0].parameters() if p not in compact)}
    for work in (save, load):
        found[f"{work.__name__}_peak"] = _peak(work)
        gc.collect()
        before = _live()
        gc.disable()
        try:
            work()
            found[f"{work.__name__}_left"] = _live() - before
        finally:
            gc.enable()
    return found


def _anonymous_peak(work: Callable[[], Any]) -> int:
    """Bytes by which this process's own pages rise at most, sampled; those of mapped files are the system's cache."""
    ctypes.CDLL(None).malloc_trim(0)
    before, peak, done = _status("RssAnon"), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], _status("RssAnon") - before)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return peak[0]


def convert(model: str, target: str, max_shard_size: int) -> dict[str, int]:
    """Bytes on this rank beside its shard: peaks over an import and an export."""
    session = open_model(run_config(model, mesh(), "bf16"), load=False)
    for local in session.layout:
        local.param.data.zero_()  # from here on all pages of the shard are there
    layout, checkpoint = session.layout, session.source.checkpoint
    return {
        "import": _anonymous_peak(lambda: import_weights(layout, checkpoint)),
        "export": _anonymous_peak(
            lambda: export_model(layout, session.mesh, checkpoint, Path(target), max_shard_size, writers=1)
        ),
    }
