"""Roofline of one layer's linear products and of its optimizer update: what bounds each, and what a frozen half saves."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import Timing, interleave, milliseconds, show, write_json
from rich.console import Console

from megatron_ssu.estimate.gpus import gpu_named
from megatron_ssu.shield.wgrad import MatrixColumns

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Work:
    """One row: a product or a pass over memory."""

    name: str
    flops: float
    bytes: float
    run: Callable[[], object] | None = None

    def bound(self, rate: float, bandwidth: float) -> tuple[float, str]:
        """Least seconds and what bounds them."""
        math, memory = self.flops / rate, self.bytes / bandwidth
        return max(math, memory), "products" if math >= memory else "memory"


def run(options: argparse.Namespace) -> None:
    """Measure what the command line asks for, and print it."""
    works = layer(options) + update(options)
    if options.gpu:
        gpu = gpu_named(options.gpu)
        where, rate, bandwidth, timings = gpu.name, gpu.bf16 * 1e12, gpu.memory_bandwidth * 1e9, {}
    else:
        rate, bandwidth = peaks(options)
        where = f"{options.device}, {torch.get_num_threads()} threads"
        timings = interleave({w.name: w.run for w in works if w.run}, options.rounds)
    rows, results = [], []
    for work in works:
        seconds, bounded = work.bound(rate, bandwidth)
        timing = timings.get(work.name)
        intensity = f"{work.flops / work.bytes:.0f}" if work.flops else ""
        figures = [f"{work.flops / 1e9:.1f}", f"{work.bytes / 1e6:.1f}", intensity, bounded, f"{seconds * 1e3:.3g} ms"]
        rows.append([work.name, *figures, milliseconds(timing) if timing else "", share(seconds, timing)])
        results.append(
            {"what": work.name, "flops": work.flops, "bytes": work.bytes, "bound": seconds, "timing": timing}
        )
    title = (
        f"One layer of {options.hidden}, {options.tokens} tokens, {options.dtype}, ratio {options.ratio}; {where}: "
        f"{rate / 1e12:.3g} TFLOP/s, {bandwidth / 1e9:.3g} GB/s, ridge at {rate / bandwidth:.0f} FLOP/byte"
    )
    heads = ("what", "GFLOP", "MB", "FLOP/byte", "bound by", "at least", "measured", "bound/measured")
    console = Console(width=150)
    show(console, title, heads, rows)
    report(console, works, rate, bandwidth)
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k != "json"} | {"rate": rate, "bandwidth": bandwidth}
        write_json(options.json, settings, results)


def share(seconds: float, timing: Timing | None) -> str:
    return f"{seconds / timing.median:.0%}" if timing else ""


def layer(options: argparse.Namespace) -> list[Work]:
    """The products of the four linear layers of a decoder layer: q, k, v; output; gate, up; down."""
    hidden, ffn = options.hidden, options.ffn or int(2.75 * options.hidden)
    shapes = {"qkv": (hidden, 3 * hidden, 3), "proj": (hidden, hidden, 1)}
    shapes |= {"gate and up": (hidden, 2 * ffn, 2), "down": (ffn, hidden, 1)}
    works = []
    for name, (inputs, outputs, matrices) in shapes.items():
        works += linear(name, inputs, outputs, matrices, options)
    return works


def linear(name: str, inputs: int, outputs: int, matrices: int, options: argparse.Namespace) -> list[Work]:
    """Forward, input gradient, dense weight gradient and that of the trainable columns of [outputs, inputs] weights."""
    tokens, dtype = options.tokens, DTYPES[options.dtype]
    size, kept = dtype.itemsize, inputs - int(options.ratio * inputs)
    flops = 2.0 * tokens * inputs * outputs
    moved = size * (tokens * inputs + inputs * outputs + tokens * outputs)
    # megatron adds into float32 buffers: the weight gradient is read and written there.
    dense = size * (tokens * inputs + tokens * outputs) + 8 * inputs * outputs
    part = size * (tokens * inputs + matrices * tokens * kept + tokens * outputs) + 8 * kept * outputs
    runs: tuple[Callable[[], object] | None, ...] = (None,) * 4
    if not options.gpu:
        runs = calls(inputs, outputs, matrices, kept, options)
    return [
        Work(f"{name}: forward", flops, moved, runs[0]),
        Work(f"{name}: input gradient", flops, moved, runs[1]),
        Work(f"{name}: weight gradient", flops, dense, runs[2]),
        Work(f"{name}: of trainable columns", flops * kept / inputs, part, runs[3]),
    ]


def calls(
    inputs: int, outputs: int, matrices: int, kept: int, options: argparse.Namespace
) -> tuple[Callable[[], object], ...]:
    """The four as calls on random tensors."""
    dtype, device = DTYPES[options.dtype], options.device
    generator = torch.Generator(device).manual_seed(0)
    x, y, weight = (
        torch.randn(shape, generator=generator, device=device).to(dtype)
        for shape in ((options.tokens, inputs), (options.tokens, outputs), (outputs, inputs))
    )
    main_grad = torch.zeros(outputs, inputs, device=device)
    rows = outputs // matrices
    columns = [torch.randperm(inputs, device=device)[:kept].sort().values for _ in range(matrices)]
    parts = [MatrixColumns(1, outputs, i * rows, rows, chosen) for i, chosen in enumerate(columns)]

    def trainable() -> None:
        for part in parts:
            part.add_gradient(main_grad, y, x)

    return (
        lambda: x.matmul(weight.t()),
        lambda: y.matmul(weight),
        lambda: main_grad.add_(y.t().matmul(x)),
        trainable,
    )


def update(options: argparse.Namespace) -> list[Work]:
    """Bytes of the optimizer phase over all weights of the layer: stock and shielded, Adam in one pass (fused)."""
    hidden, ffn = options.hidden, options.ffn or int(2.75 * options.hidden)
    elements = 4 * hidden * hidden + 3 * hidden * ffn
    size, kept = DTYPES[options.dtype].itemsize, 1 - options.ratio
    # Norm reads the gradient, clipping reads and writes it, Adam reads four and writes three float32 values.
    adam = 4 * (1 + 2 + 7)
    store = 4 + size if size < 4 else 0  # main weight read, weight written; in fp32 they are one
    gather, scatter = 4 + 4 * kept, 4 * kept + 2 * size
    return [
        Work("update: stock", 0.0, float(elements * (adam + store))),
        Work("update: shielded", 0.0, float(elements * (adam * kept + gather + scatter))),
    ]


def peaks(options: argparse.Namespace) -> tuple[float, float]:
    """FLOP/s of a product of two 4096 x 4096 matrices and bytes/s (read and written) of a copy of 256 MiB, here."""
    dtype, side = DTYPES[options.dtype], 4096
    a = torch.randn(side, side, device=options.device).to(dtype)
    source = torch.randn(2**26, device=options.device)
    target = torch.empty_like(source)
    best = interleave({"product": lambda: a.matmul(a), "copy": lambda: target.copy_(source)}, options.rounds)
    return 2 * side**3 / best["product"].median, 2 * source.nbytes / best["copy"].median


def report(console: Console, works: list[Work], rate: float, bandwidth: float) -> None:
    """The step that the bounds allow, against full fine-tuning."""

    def total(*endings: str) -> float:
        return sum(work.bound(rate, bandwidth)[0] for work in works if work.name.endswith(endings))

    both = total("forward", "input gradient")
    dense, part = both + total(": weight gradient"), both + total("trainable columns")
    console.print(f"products at their bounds: shielded / full {part / dense:.3f}")
    console.print(f"update at its bound: shielded / full {total(': shielded') / total(': stock'):.3f}")
