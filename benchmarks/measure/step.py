"""What step.py times: trainers with stock megatron-core and with shields, one step at a time."""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import show, write_json
from megatron.core.extensions import transformer_engine as engine
from rich.console import Console
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from measure.variants import STOCK, batches, build, chosen, exchanged_bytes, make_model, model_state
from megatron_ssu.compact.selection import Blocks, Picked, Together
from megatron_ssu.compact.shards import ShardMask
from megatron_ssu.engine.device import device_name, has_cuda
from megatron_ssu.engine.mesh import start_processes
from megatron_ssu.estimate.flops import flops_per_token
from megatron_ssu.estimate.hardware import peak_flops
from megatron_ssu.train.times import Clock, HostClock, StreamClock
from megatron_ssu.train.trainer import Trainer

WARMUP = 2  # steps that are not counted
PASSES = 2  # in turns: how often every variant is built
MARKED = 3  # in turns: steps of their own that time the shield
PHASES = {"forward": "forward-compute", "backward": "backward-compute", "grad sync": "all-grads-sync"}
SIZES = ("state", "exchange", "peak")
# What a shield moves in a step.
SHIELD: tuple[tuple[type, str], ...] = (
    (ShardMask, "gather"),
    (ShardMask, "scatter"),
    (Picked, "columns"),
    (Picked, "rows"),
    (Together, "columns"),
)
SHIELD += ((Blocks, "columns"), (Blocks, "rows"))


def run(options: argparse.Namespace) -> None:
    """Measure what the command line asks for, and print it."""
    if options.peak:
        sys.stdout.write(json.dumps(peak(options, *options.peak)))
        return
    start_processes()
    names = chosen(options.variants)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(options, Path(folder) / "model")
        if options.profile:
            rows = profile(options, model, options.profile)
        elif has_cuda() if options.in_turns is None else options.in_turns:
            rows = table(options, *measure_in_turns(options, model, names))
        else:
            rows = table(options, *measure_side_by_side(options, model, names))
    kind = options.dtype + (f" with FP8 {options.fp8}, {options.fp8_recipe} scaling" if options.fp8 else "")
    kernels = f", {'fused' if options.fused else 'unfused'} kernels" if has_cuda() else ""
    tokens = options.batch * options.length
    title = f"{kind}{kernels}, hidden {options.hidden}, {options.layers} layers, {tokens} tokens per step; "
    title += f"{options.profile}, three steps" if options.profile else "ratios to stock"
    show(Console(width=220), title, list(rows[0]), [list(row.values()) for row in rows])
    if options.json:
        write_json(options.json, {k: v for k, v in vars(options).items() if k not in ("json", "peak")}, rows)


class Timers:
    """What megatron's schedules and gradient sync tell their timers: stretches by name, read when a step is over."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.stretches: list[tuple[str, Any, Any]] = []
        self.running: dict[str, Any] = {}  # megatron asks for a timer anew to stop it

    def __call__(self, name: str, log_level: int = 0) -> Timer:
        return Timer(self, name)

    def seconds(self) -> dict[str, float]:
        """Seconds by name; on CUDA the device must have reached the last stretch's end."""
        found: dict[str, float] = {}
        for name, first, second in self.stretches:
            spent = self.clock.between(first, second)
            assert spent is not None
            found[name] = found.get(name, 0.0) + spent
        return found


class Timer:
    def __init__(self, timers: Timers, name: str) -> None:
        self._timers, self._name = timers, name

    def start(self, barrier: bool = False) -> None:
        self._timers.running[self._name] = self._timers.clock.mark()

    def stop(self, barrier: bool = False) -> None:
        self._timers.stretches.append((self._name, self._timers.running.pop(self._name), self._timers.clock.mark()))


@contextmanager
def bookkeeping(timers: Timers) -> Iterator[None]:
    """Times all gathers and scatters of a shield as 'shield': of compact parameters, and of the operands of their GEMMs."""

    def timed(work: Any) -> Any:
        def run(*args: Any) -> Any:
            begin = timers.clock.mark()
            result = work(*args)
            timers.stretches.append(("shield", begin, timers.clock.mark()))
            return result

        return run

    with ExitStack() as stack:
        for owner, name in SHIELD:
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name))))
        yield


def timed_step(trainer: Trainer, data: Any, *, shield: bool = True) -> dict[str, float]:
    """Seconds of one step by phase; with `shield` those of gathers and scatters too, for which the host marks every one."""
    timers = trainer.session.config.timers = Timers(StreamClock() if has_cuda() else HostClock())
    trainer.times.take()
    with bookkeeping(timers) if shield else nullcontext():
        finish()
        begin = time.perf_counter()
        trainer.step(data)
        finish()
        spent = {"step": time.perf_counter() - begin}
    seconds = timers.seconds()
    spent |= {name: seconds.get(key, 0.0) for name, key in PHASES.items()}
    return spent | {"optimizer": trainer.times.take()["optimizer"], "shield": seconds.get("shield", 0.0)}


def finish() -> None:
    """Wait for the GPU, where there is one."""
    if has_cuda():
        torch.cuda.synchronize()


Rounds = dict[str, list[dict[str, float]]]  # variant -> seconds by phase of each round
Sizes = dict[str, dict[str, float]]  # variant -> bytes of state and exchange and at the peak, FLOP of a step


def measure_side_by_side(options: argparse.Namespace, model: Path, names: list[str]) -> tuple[Rounds, Rounds, Sizes]:
    """Every variant's rounds, the rounds of stock that they are compared with, and sizes; all variants held at once."""
    peaks = {name: ask_peak(name, model) for name in names}
    trainers = {name: build(options, model, name) for name in names}
    data = batches(options)
    seconds: Rounds = {name: [] for name in names}
    for number in range(options.rounds + WARMUP):
        for name, trainer in trainers.items():
            spent = timed_step(trainer, data)
            if number >= WARMUP:
                seconds[name].append(spent)
    sizes = {name: sizes_of(options, trainer, peaks[name]) for name, trainer in trainers.items()}
    return seconds, dict.fromkeys(names, seconds[STOCK]), sizes


def measure_in_turns(options: argparse.Namespace, model: Path, names: list[str]) -> tuple[Rounds, Rounds, Sizes]:
    """The same with one variant in memory at a time; stock's rounds are the medians of the same pass."""
    seconds: Rounds = {name: [] for name in names}
    compared: Rounds = {name: [] for name in names}
    sizes: Sizes = {}
    for _ in range(PASSES):
        stock: dict[str, float] = {}
        for name in names:
            found, size = alone(options, model, name)
            sizes.setdefault(name, size)  # the first pass began with an empty GPU
            stock = stock or {phase: float(np.median([a[phase] for a in found])) for phase in found[0]}
            seconds[name] += found
            compared[name] += [stock] * len(found)
    if not has_cuda():
        for name in names:
            sizes[name]["peak"] = ask_peak(name, model)
    return seconds, compared, sizes


def alone(options: argparse.Namespace, model: Path, name: str) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Rounds and sizes of one variant, which is gone afterwards."""
    if has_cuda():
        torch.cuda.reset_peak_memory_stats()
    trainer, data = build(options, model, name), batches(options)
    found = [timed_step(trainer, data, shield=False) for _ in range(-(-options.rounds // PASSES) + WARMUP)][WARMUP:]
    marked = [timed_step(trainer, data) for _ in range(MARKED)]
    share = float(np.median([step["shield"] / step["step"] for step in marked]))
    for step in found:
        step["shield"] = share * step["step"]
    size = sizes_of(options, trainer, torch.cuda.max_memory_allocated() if has_cuda() else 0)
    del trainer
    if engine.HAVE_TE:
        engine.FP8GlobalStateManager.reset()  # it keeps the scales of layers that are gone
    gc.collect()
    if has_cuda():
        torch.cuda.empty_cache()
    return found, size


def sizes_of(options: argparse.Namespace, trainer: Trainer, peak: float) -> dict[str, float]:
    """Bytes and FLOP of a variant whose peak is known."""
    exchange = exchanged_bytes(trainer)
    return {"state": model_state(trainer), "exchange": exchange, "peak": peak, "flops": flops(options, trainer)}


def flops(options: argparse.Namespace, trainer: Trainer) -> float:
    """Model FLOP of a step of full fine-tuning."""
    source = trainer.session.source
    return options.batch * options.length * flops_per_token(source.family, source.dims, options.length)


def table(options: argparse.Namespace, seconds: Rounds, compared: Rounds, sizes: Sizes) -> list[dict[str, Any]]:
    """One row per variant."""
    rows = []
    for name, own in seconds.items():
        ratios = {k: [a[k] / b[k] for a, b in zip(own, compared[name], strict=True) if b[k]] for k in own[0]}
        low, high = np.percentile(ratios["step"], (25, 75))
        step = float(np.median([a["step"] for a in own]))
        row: dict[str, Any] = {"what": name, "step ms": round(1e3 * step, 1)}
        row["step"] = round(float(np.median(ratios["step"])), 3)
        row["spread"] = f"{low:.3f}-{high:.3f}"
        for phase in ("forward", "backward", "optimizer"):
            row[phase] = round(float(np.median(ratios[phase])), 3)
        row["sync ms"] = round(1e3 * float(np.median([a["grad sync"] for a in own])), 1)
        row["shield %"] = round(100 * float(np.median([a["shield"] / a["step"] for a in own])), 2)
        for what in SIZES:
            row[f"{what} MiB"] = round(sizes[name][what] / 2**20, 1)
        if has_cuda():
            rate = peak_flops(device_name())
            row["MFU %"] = round(100 * sizes[name]["flops"] / step / rate, 1) if rate else "?"
        rows.append(row)
    for row in rows:
        for what in SIZES:
            row[what] = round(row[f"{what} MiB"] / rows[0][f"{what} MiB"], 3)
    return rows


def profile(options: argparse.Namespace, model: Path, name: str, top: int = 25) -> list[dict[str, Any]]:
    """The kernels (on a CPU: operators) that took longest in three steps of a variant."""
    trainer, data = build(options, model, name), batches(options)
    for _ in range(WARMUP):
        trainer.step(data)
    finish()
    cuda = has_cuda()
    kind = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with torch.profiler.profile(activities={ProfilerActivity.CPU, kind}) as found:
        for _ in range(3):
            trainer.step(data)
        finish()
    key, device = ("self_device_time_total", DeviceType.CUDA) if cuda else ("self_cpu_time_total", DeviceType.CPU)
    events = [
        e for e in found.key_averages() if e.device_type == device and not getattr(e, "is_user_annotation", False)
    ]
    events.sort(key=lambda event: getattr(event, key), reverse=True)
    total = sum(getattr(event, key) for event in events) or 1
    return [
        {
            "what": event.key[:110],
            "calls": event.count,
            "ms": round(getattr(event, key) / 1e3, 3),
            "fraction %": round(100 * getattr(event, key) / total, 1),
        }
        for event in events[:top]
    ]


def ask_peak(variant: str, model: Path) -> int:
    """`peak` of a child process."""
    command = [sys.executable, sys.argv[0], *sys.argv[1:], "--peak", variant, str(model)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak(options: argparse.Namespace, variant: str, model: str) -> int:
    """Most bytes that a process on the CPU holds over two steps, above what it held before the model."""
    start_processes()
    before = held()
    trainer, data = build(options, Path(model), variant), batches(options)
    Path("/proc/self/clear_refs").write_text("5")  # begin a new peak: reading the weights is over
    for _ in range(2):
        trainer.step(data)
    return held("VmHWM") - before


def held(what: str = "VmRSS") -> int:
    """Bytes of this process in memory now, or (VmHWM) at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))
