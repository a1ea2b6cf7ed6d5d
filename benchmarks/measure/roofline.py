"""Roofline of one layer's linear GEMMs and of its optimizer update: what bounds each, and what a frozen half saves."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import Timing, interleave, milliseconds, show, write_json
from rich.console import Console

from megatron_ssu.compact.gemm import add_gemm
from megatron_ssu.compact.matrix import padded
from megatron_ssu.compact.selection import Blocks, Everything, Picked, Selection, Together, Workspace
from megatron_ssu.estimate.hardware import gpu_named
from megatron_ssu.models.build import DTYPES

HEAD = 128  # outputs of an attention head
Part = tuple[torch.Tensor, Selection, Selection]  # a compact gradient, and the outputs and inputs that it is of


@dataclass(frozen=True)
class Work:
    """One row: a GEMM, with what it needs before it, or a pass over memory."""

    name: str
    flops: float
    bytes: float
    run: Callable[[], object] | None = None

    def bound(self, rate: float, bandwidth: float) -> tuple[float, str]:
        """Least seconds and what bounds them."""
        math, memory = self.flops / rate, self.bytes / bandwidth
        return max(math, memory), "GEMM" if math >= memory else "memory"


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
        rows.append([work.name, *figures, milliseconds(timing) if timing else "", fraction(seconds, timing)])
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


def fraction(seconds: float, timing: Timing | None) -> str:
    return f"{seconds / timing.median:.0%}" if timing else ""


def layer(options: argparse.Namespace) -> list[Work]:
    """The GEMMs of the four linear layers of a decoder layer: q, k, v; output; gate, up; down."""
    hidden, ffn = options.hidden, options.ffn or int(2.75 * options.hidden)
    heads = hidden // HEAD if hidden % HEAD == 0 else 1
    # Inputs, and how the rows of each logical matrix lie: those of q, k and v alternate, a group of heads at a time.
    layers = {
        "qkv": (hidden, [Blocks(heads, 3 * hidden // heads, i * hidden // heads, hidden // heads) for i in range(3)])
    }
    layers["proj"] = (hidden, [Blocks(1, hidden, 0, hidden)])
    layers["gate and up"] = (hidden, [Blocks(1, 2 * ffn, i * ffn, ffn) for i in range(2)])
    layers["down"] = (ffn, [Blocks(1, hidden, 0, hidden)])
    works = []
    for name, (inputs, matrices) in layers.items():
        works += linear(name, inputs, matrices, options)
    return works


def linear(name: str, inputs: int, matrices: list[Blocks], options: argparse.Namespace) -> list[Work]:
    """Forward, input gradient, whole weight gradient and those of trainable columns and rows."""
    tokens, size = options.tokens, DTYPES[options.dtype].itemsize
    outputs = sum(matrix.groups * matrix.count for matrix in matrices)
    columns = padded(inputs - int(options.ratio * inputs))
    rows = [padded(m.groups * m.count - int(options.ratio * m.groups * m.count)) for m in matrices]
    flops = 2.0 * tokens * inputs * outputs
    moved = size * (tokens * inputs + inputs * outputs + tokens * outputs)
    # Gradients are in float32 buffers, read and written; what was gathered is written and read again.
    operands = size * (tokens * inputs + tokens * outputs)
    by_column = operands + 2 * size * tokens * columns * len(matrices) + 8 * columns * outputs
    by_row = operands + 2 * size * tokens * sum(rows) + 8 * sum(rows) * inputs
    runs: tuple[Callable[[], object] | None, ...] = (None,) * 5
    if not options.gpu:
        runs = calls(inputs, outputs, matrices, columns, rows, options)
    return [
        Work(f"{name}: forward", flops, moved, runs[0]),
        Work(f"{name}: input gradient", flops, moved, runs[1]),
        Work(f"{name}: weight gradient", flops, operands + 8 * inputs * outputs, runs[2]),
        Work(f"{name}: of trainable columns", flops * columns / inputs, by_column, runs[3]),
        Work(f"{name}: of trainable rows", flops * sum(rows) / outputs, by_row, runs[4]),
    ]


def calls(
    inputs: int, outputs: int, matrices: list[Blocks], columns: int, rows: list[int], options: argparse.Namespace
) -> tuple[Callable[[], object], ...]:
    """The five as calls on random tensors."""
    dtype, device = DTYPES[options.dtype], options.device
    generator = torch.Generator(device).manual_seed(0)
    x, y, weight = (
        torch.randn(shape, generator=generator, device=device).to(dtype)
        for shape in ((options.tokens, inputs), (options.tokens, outputs), (outputs, inputs))
    )
    main_grad = torch.zeros(outputs, inputs, device=device)
    by_column: list[Part] = []
    by_row: list[Part] = []
    for matrix, kept in zip(matrices, rows, strict=True):
        shape = (matrix.groups * matrix.count, columns)
        by_column.append((torch.zeros(shape, device=device), matrix, picked(inputs, options)))
        own = matrix.rows(torch.arange(outputs, device=device)[:, None]).view(-1)
        chosen = own[picked(len(own), options).index]
        by_row.append((torch.zeros(kept, inputs, device=device), Picked(chosen, outputs, kept), Everything()))

    def compact(parts: list[Part]) -> Callable[[], object]:
        selected = Together([input for *_, input in parts], Workspace())

        def run() -> None:
            for (gradient, output, _), columns in zip(parts, selected.columns(x), strict=True):
                add_gemm(gradient, output.columns(y), columns)

        return run

    return (
        lambda: x.matmul(weight.t()),
        lambda: y.matmul(weight),
        lambda: add_gemm(main_grad, y, x),
        compact(by_column),
        compact(by_row),
    )


def picked(count: int, options: argparse.Namespace) -> Picked:
    """What trains of `count` units, chosen at random."""
    kept = count - int(options.ratio * count)
    index = torch.randperm(count, device=options.device)[:kept].sort().values
    return Picked(index, count, padded(kept))


def update(options: argparse.Namespace) -> list[Work]:
    """Bytes of the optimizer phase over all weights of the layer: stock and shielded, Adam in one pass (fused)."""
    hidden, ffn = options.hidden, options.ffn or int(2.75 * options.hidden)
    elements = 4 * hidden * hidden + 3 * hidden * ffn
    size, kept = DTYPES[options.dtype].itemsize, 1 - options.ratio
    # Norm reads the gradient, clipping reads and writes it, Adam reads four and writes three float32 values.
    adam = 4 * (1 + 2 + 7)
    store = 4 + size if size < 4 else 0  # main weight read, weight written; in fp32 they are one
    # Once per step the compact parameters are read, and the weights' cache lines read and written.
    scatter = size * kept + 2 * size
    return [
        Work("update: stock", 0.0, float(elements * (adam + store))),
        Work("update: shielded", 0.0, float(elements * (kept * (adam + store) + scatter))),
    ]


def peaks(options: argparse.Namespace) -> tuple[float, float]:
    """FLOP/s of a GEMM of two 4096 x 4096 matrices and bytes/s (read and written) of a copy of 256 MiB, here."""
    dtype, side = DTYPES[options.dtype], 4096
    a = torch.randn(side, side, device=options.device).to(dtype)
    source = torch.randn(2**26, device=options.device)
    target = torch.empty_like(source)
    best = interleave({"gemm": lambda: a.matmul(a), "copy": lambda: target.copy_(source)}, options.rounds)
    return 2 * side**3 / best["gemm"].median, 2 * source.nbytes / best["copy"].median


def report(console: Console, works: list[Work], rate: float, bandwidth: float) -> None:
    """The step that the bounds allow, against full fine-tuning."""

    def total(*endings: str) -> float:
        return sum(work.bound(rate, bandwidth)[0] for work in works if work.name.endswith(endings))

    both = total("forward", "input gradient")
    dense = both + total(": weight gradient")
    for what in ("columns", "rows"):
        part = both + total(f"trainable {what}")
        console.print(f"GEMMs at their bounds, {what}: shielded / full {part / dense:.3f}")
    console.print(f"update at its bound: shielded / full {total(': shielded') / total(': stock'):.3f}")
