"""A training step under shields of several ratios against full fine-tuning on stock megatron-core, in one process.

python benchmarks/step.py [--layers 1] [--hidden 2048] [--dtype bf16] [--rounds 9] [--json FILE]
python benchmarks/step.py --hidden 5120 --ffn 13824 --heads 40 --length 4096 --micro-batch 1 --layers 4      (13B layers, a GPU)

Stock is megatron's own DistributedOptimizer, linear layers and Adam in the same loop; "stock, fused" has torch's fused AdamW,
as this trainer has where neither Transformer Engine's nor Apex's is there. All variants take a step in turn; a figure is the
median over the rounds, its ratio that of the rounds' own ratios to stock. Peak memory is that of a process of its own for
each variant, above what it held before the model: without the libraries.
"""

from __future__ import annotations

import argparse
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
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from rich.console import Console

from megatron_ssu import runtime
from megatron_ssu.config.schema import (
    CheckpointSection,
    DataSection,
    ModelSection,
    PrecisionSection,
    RunConfig,
    TrainSection,
)
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.session import open_session, open_source
from megatron_ssu.shield.file import Mask, Shield
from megatron_ssu.shield.optimizer import ShieldedDistributedOptimizer, state_bytes
from megatron_ssu.shield.shards import ShardMask
from megatron_ssu.train import loop
from megatron_ssu.train.flops import flops_per_token, peak_flops

VARIANTS = ("stock", "stock, fused", "SSU 0.0", "SSU 0.25", "SSU 0.5", "SSU 0.75")
PHASES = {"forward": "forward-compute", "backward": "backward-compute", "grad sync": "all-grads-sync"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, help="default 2.75 x hidden")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--length", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences a micro-batch")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--fp8", choices=("hybrid", "e4m3"), help="Transformer Engine's FP8, on a GPU")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--peak", nargs=2, metavar=("VARIANT", "MODEL"), help=argparse.SUPPRESS)  # the measured child
    options = parser.parse_args()
    if options.peak:
        sys.stdout.write(json.dumps(peak(options, *options.peak)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(options, Path(folder) / "model")
        peaks = {variant: ask_peak(variant, model) for variant in VARIANTS}
        rows = measure(options, model, peaks)
    kind = options.dtype + (f" with FP8 {options.fp8}" if options.fp8 else "")
    tokens = options.batch * options.length
    title = f"{kind}, hidden {options.hidden}, {options.layers} layers, {tokens} tokens a step; ratios to stock"
    show(Console(width=170), title, list(rows[0]), [list(row.values()) for row in rows])
    if options.json:
        write_json(options.json, {k: v for k, v in vars(options).items() if k not in ("json", "peak")}, rows)


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
    """What megatron's schedules and gradient sync tell their timers: seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, log_level: int = 0) -> Timer:
        return Timer(self.seconds, name)


class Timer:
    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def start(self, barrier: bool = False) -> None:
        self._seconds[self._name] = self._seconds.get(self._name, 0.0) - now()

    def stop(self, barrier: bool = False) -> None:
        self._seconds[self._name] += now()


def now() -> float:
    if runtime.has_cuda():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def bookkeeping(seconds: dict[str, float]) -> Iterator[None]:
    """Adds the time of all gathers and scatters of shards to seconds['shield']."""

    def timed(work: Any) -> Any:
        def run(*args: Any) -> None:
            begin = now()
            work(*args)
            seconds["shield"] += now() - begin

        return run

    seconds["shield"] = 0.0
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
    timers = trainer.session.config.timers = Timers()
    trainer.phases.take()
    clip = (
        loop.clip if isinstance(trainer.optimizer.chained_optimizers[0], ShieldedDistributedOptimizer) else stock_clip
    )
    with bookkeeping(timers.seconds), mock.patch.object(loop, "clip", clip):
        begin = now()
        trainer.step(data)
        spent = {"step": now() - begin}
    spent |= {name: timers.seconds.get(key, 0.0) for name, key in PHASES.items()}
    return spent | {"optimizer": trainer.phases.take()["optimizer"], "shield": timers.seconds["shield"]}


def measure(options: argparse.Namespace, model: Path, peaks: dict[str, int]) -> list[dict[str, Any]]:
    """One row a variant."""
    runtime.start_processes()
    trainers = {variant: build(options, model, variant) for variant in VARIANTS}
    data = batches(options)
    seconds: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for number in range(options.rounds + 2):
        for variant, trainer in trainers.items():
            spent = timed_step(trainer, data)
            if number >= 2:
                seconds[variant].append(spent)
    rows = []
    for variant, trainer in trainers.items():
        own = seconds[variant]
        shares = {k: [a[k] / b[k] for a, b in zip(own, seconds["stock"], strict=True) if b[k]] for k in (*own[0],)}
        low, high = np.percentile(shares["step"], (25, 75))
        step = float(np.median([a["step"] for a in own]))
        row: dict[str, Any] = {"what": variant, "step ms": round(1e3 * step, 1)}
        row["step"] = round(float(np.median(shares["step"])), 3)
        row["spread"] = f"{low:.3f}-{high:.3f}"
        for phase in ("forward", "backward", "optimizer"):
            row[phase] = round(float(np.median(shares[phase])), 3)
        row["sync ms"] = round(1e3 * float(np.median([a["grad sync"] for a in own])), 1)
        row["shield %"] = round(100 * float(np.median([a["shield"] / a["step"] for a in own])), 2)
        row["state MiB"] = round(model_state(trainer) / 2**20, 1)
        row["peak MiB"] = round(peaks[variant] / 2**20, 1)
        if runtime.has_cuda():
            source, tokens = trainer.session.source, options.batch * options.length
            peak_rate = peak_flops(runtime.device_name())
            work = tokens * flops_per_token(source.family, source.dims, options.length)
            row["MFU %"] = round(100 * work / step / peak_rate, 1) if peak_rate else "?"
        rows.append(row)
    for row in rows:
        row["state"] = round(row["state MiB"] / rows[0]["state MiB"], 3)
        row["peak"] = round(row["peak MiB"] / rows[0]["peak MiB"], 3)
    return rows


def ask_peak(variant: str, model: Path) -> int:
    """`peak` of a child process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak", variant, str(model)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak(options: argparse.Namespace, variant: str, model: str) -> int:
    """Most bytes that a process holds over two steps, above what it held before the model."""
    runtime.start_processes()
    before = held()
    trainer, data = build(options, Path(model), variant), batches(options)
    Path("/proc/self/clear_refs").write_text("5")  # begin a new peak: reading the weights is over
    if runtime.has_cuda():
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        trainer.step(data)
    if runtime.has_cuda():
        return torch.cuda.max_memory_allocated()
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


if __name__ == "__main__":
    main()
