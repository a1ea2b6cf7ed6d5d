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
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import show, write_json
from megatron.core.extensions import transformer_engine as engine
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from rich.console import Console
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from megatron_ssu.config.schema import (
    CheckpointSection,
    DataSection,
    ModelSection,
    PrecisionSection,
    RunConfig,
    TrainSection,
)
from megatron_ssu.engine.device import device_name, has_cuda
from megatron_ssu.engine.mesh import start_processes
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.session import open_session, open_source
from megatron_ssu.shield.file import Mask, Shield
from megatron_ssu.shield.optimizer import ShieldedDistributedOptimizer, state_bytes
from megatron_ssu.shield.shards import ShardMask
from megatron_ssu.train import loop
from megatron_ssu.train.flops import flops_per_token, peak_flops
from megatron_ssu.train.phases import Clock, HostClock, StreamClock

VARIANTS = ("stock", "stock, fused", "SSU 0.0", "SSU 0.25", "SSU 0.5", "SSU 0.75")
FUSED_MODEL = ("bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion")
FUSED_PARALLEL = ("cross_entropy_loss_fusion", "gradient_accumulation_fusion")
WARMUP = 2  # steps that are not counted
PASSES = 2  # on a GPU: how often every variant is built
PHASES = {"forward": "forward-compute", "backward": "backward-compute", "grad sync": "all-grads-sync"}


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
        elif has_cuda():
            rows = table(options, *measure_in_turns(options, model, names))
        else:
            rows = table(options, *measure_side_by_side(options, model, names))
    kind = options.dtype + (f" with FP8 {options.fp8}" if options.fp8 else "")
    kernels = f", {'fused' if options.fused else 'unfused'} kernels" if has_cuda() else ""
    tokens = options.batch * options.length
    title = f"{kind}{kernels}, hidden {options.hidden}, {options.layers} layers, {tokens} tokens a step; "
    title += f"{options.profile}, three steps" if options.profile else "ratios to stock"
    show(Console(width=170), title, list(rows[0]), [list(row.values()) for row in rows])
    if options.json:
        write_json(options.json, {k: v for k, v in vars(options).items() if k not in ("json", "peak")}, rows)


def chosen(names: list[str] | None) -> list[str]:
    """The variants to measure, stock always and first; with Transformer Engine's or Apex's Adam torch's is no variant."""
    from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE

    names = names or [name for name in VARIANTS if not (HAVE_APEX_OR_TE and name == "stock, fused")]
    return ["stock", *(name for name in names if name != "stock")]


def make_model(options: argparse.Namespace, directory: Path) -> Path:
    """A random OLMo-2 of the asked size."""
    import transformers

    config = transformers.Olmo2Config(
        hidden_size=options.hidden,
        intermediate_size=options.ffn or int(2.75 * options.hidden),
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        vocab_size=options.vocab,
        max_position_embeddings=options.length,
    )
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    transformers.Olmo2ForCausalLM(config).to(dtype).save_pretrained(directory)
    return directory


def random_shield(model: Path, ratio: float) -> Shield:
    """Random columns of every linear weight."""
    source, draw = open_source(model), np.random.default_rng(0)
    matrices = {m.name: m for m in source.family.linear_matrices(source.dims)} if ratio else {}
    masks = {}
    for name, matrix in matrices.items():
        frozen = np.zeros(matrix.shape[1], dtype=bool)
        frozen[draw.permutation(matrix.shape[1])[: int(ratio * matrix.shape[1])]] = True
        masks[name] = Mask.of("column", matrix.shape, frozen)
    return Shield("ssu", source.name, model_fingerprint(model), matrices=matrices, masks=masks)


def batches(options: argparse.Namespace) -> Iterator[dict[str, torch.Tensor]]:
    """The same random sequences for ever."""
    size = (options.micro_batch, options.length + 1)
    stream = torch.randint(0, options.vocab, size, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(options.micro_batch, options.length)
    positions = torch.arange(options.length).expand(options.micro_batch, -1)
    while True:
        yield {"tokens": stream[:, :-1], "labels": stream[:, 1:], "loss_mask": ones, "position_ids": positions}


def build(options: argparse.Namespace, model: Path, variant: str) -> loop.Trainer:
    """The trainer of a variant."""
    precision = {"fp8": options.fp8} if options.fp8 else {}
    run = RunConfig(
        model=ModelSection(path=str(model)),
        checkpoint=CheckpointSection(directory="unused"),
        precision=PrecisionSection(dtype=options.dtype, transformer=precision),
        data=DataSection(sequence_length=options.length),
        train=TrainSection(
            iterations=10**6,
            micro_batch_size=options.micro_batch,
            global_batch_size=options.batch,
            fused_adam=variant != "stock",
        ),
    )
    if not options.fused:
        run.model.transformer.update(dict.fromkeys(FUSED_MODEL, False))
        run.parallel.transformer.update(dict.fromkeys(FUSED_PARALLEL, False))
    session = open_session(run)
    name, _, ratio = variant.partition(" ")
    if name == "SSU":
        return loop.Trainer(session, random_shield(model, float(ratio)))
    with mock.patch.object(loop, "build_optimizer", stock_optimizer), mock.patch.object(loop, "attach", lambda *_: 0):
        return loop.Trainer(session, random_shield(model, 0.0))


def stock_optimizer(config: Any, chunks: Any, _: Any, *, fused_adam: bool) -> Any:
    """megatron's own."""
    optimizer = get_megatron_optimizer(config, chunks)
    for group in optimizer.param_groups if fused_adam else ():
        group["fused"] = True
    return optimizer


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
    """Times all gathers and scatters of shards as 'shield'."""

    def timed(work: Any) -> Any:
        def run(*args: Any) -> None:
            begin = timers.clock.mark()
            work(*args)
            timers.stretches.append(("shield", begin, timers.clock.mark()))

        return run

    gather, scatter = timed(ShardMask.gather), timed(ShardMask.scatter)
    with mock.patch.object(ShardMask, "gather", gather), mock.patch.object(ShardMask, "scatter", scatter):
        yield


@torch.no_grad()
def stock_clip(optimizer: Any, norm: float) -> None:
    """megatron's own."""
    for member in optimizer.chained_optimizers:
        clip_grad_by_total_norm_fp32(member.get_parameters(), max_norm=member.config.clip_grad, total_norm=norm)


def timed_step(trainer: loop.Trainer, data: Any) -> dict[str, float]:
    """Seconds of one step by phase."""
    timers = trainer.session.config.timers = Timers(StreamClock() if has_cuda() else HostClock())
    trainer.phases.take()
    clip = (
        loop.clip if isinstance(trainer.optimizer.chained_optimizers[0], ShieldedDistributedOptimizer) else stock_clip
    )
    with bookkeeping(timers), mock.patch.object(loop, "clip", clip):
        finish()
        begin = time.perf_counter()
        trainer.step(data)
        finish()
        spent = {"step": time.perf_counter() - begin}
    seconds = timers.seconds()
    spent |= {name: seconds.get(key, 0.0) for name, key in PHASES.items()}
    return spent | {"optimizer": trainer.phases.take()["optimizer"], "shield": seconds.get("shield", 0.0)}


def finish() -> None:
    """Wait for the GPU, where there is one."""
    if has_cuda():
        torch.cuda.synchronize()


Rounds = dict[str, list[dict[str, float]]]  # variant -> seconds by phase of each round
Sizes = dict[str, dict[str, float]]  # variant -> bytes of the state and at the peak, FLOP of a step


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
    sizes = {
        name: {"state": model_state(t), "peak": peaks[name], "flops": flops(options, t)} for name, t in trainers.items()
    }
    return seconds, dict.fromkeys(names, seconds["stock"]), sizes


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
    return seconds, compared, sizes


def alone(options: argparse.Namespace, model: Path, name: str) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Rounds and sizes of one variant, which is gone from the GPU afterwards."""
    torch.cuda.reset_peak_memory_stats()
    trainer, data = build(options, model, name), batches(options)
    found = [timed_step(trainer, data) for _ in range(-(-options.rounds // PASSES) + WARMUP)][WARMUP:]
    size = {"state": model_state(trainer), "peak": torch.cuda.max_memory_allocated(), "flops": flops(options, trainer)}
    del trainer
    if engine.HAVE_TE:
        engine.FP8GlobalStateManager.reset()  # it keeps the scales of layers that are gone
    gc.collect()
    torch.cuda.empty_cache()
    return found, size


def flops(options: argparse.Namespace, trainer: loop.Trainer) -> float:
    """Model FLOP of a step of full fine-tuning."""
    source = trainer.session.source
    return options.batch * options.length * flops_per_token(source.family, source.dims, options.length)


def table(options: argparse.Namespace, seconds: Rounds, compared: Rounds, sizes: Sizes) -> list[dict[str, Any]]:
    """One row a variant."""
    rows = []
    for name, own in seconds.items():
        shares = {k: [a[k] / b[k] for a, b in zip(own, compared[name], strict=True) if b[k]] for k in own[0]}
        low, high = np.percentile(shares["step"], (25, 75))
        step = float(np.median([a["step"] for a in own]))
        row: dict[str, Any] = {"what": name, "step ms": round(1e3 * step, 1)}
        row["step"] = round(float(np.median(shares["step"])), 3)
        row["spread"] = f"{low:.3f}-{high:.3f}"
        for phase in ("forward", "backward", "optimizer"):
            row[phase] = round(float(np.median(shares[phase])), 3)
        row["sync ms"] = round(1e3 * float(np.median([a["grad sync"] for a in own])), 1)
        row["shield %"] = round(100 * float(np.median([a["shield"] / a["step"] for a in own])), 2)
        row["state MiB"] = round(sizes[name]["state"] / 2**20, 1)
        row["peak MiB"] = round(sizes[name]["peak"] / 2**20, 1)
        if has_cuda():
            rate = peak_flops(device_name())
            row["MFU %"] = round(100 * sizes[name]["flops"] / step / rate, 1) if rate else "?"
        rows.append(row)
    for row in rows:
        row["state"] = round(row["state MiB"] / rows[0]["state MiB"], 3)
        row["peak"] = round(row["peak MiB"] / rows[0]["peak MiB"], 3)
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
            "share %": round(100 * getattr(event, key) / total, 1),
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


def model_state(trainer: loop.Trainer) -> int:
    """Bytes of weights, gradient buffers, main weights and moments; a main weight that is the weight itself counts once."""
    weights = {p for chunk in trainer.session.chunks for p in chunk.parameters()}
    total = state_bytes(trainer.optimizer) + sum(p.nbytes for p in weights)
    total += sum(b.grad_data.nbytes for chunk in trainer.chunks for b in chunk.buffers)
    storages = {p.untyped_storage().data_ptr() for p in weights}
    for member in trainer.optimizer.chained_optimizers:
        for group in member.optimizer.param_groups:
            total -= sum(p.nbytes for p in group["params"] if p.untyped_storage().data_ptr() in storages)
    return total
