"""Gather, scatter, columns of activations, column sums: bytes per second against a memory copy in the same run."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
from common import Timing, interleave, machine, milliseconds, show, write_json
from rich.console import Console

from megatron_ssu.compact.shards import RowRun, ShardMask
from megatron_ssu.models.build import DTYPES
from megatron_ssu.ops import kernels


def touched(trainable: torch.Tensor, size: int, line: int) -> int:
    """Bytes of the lines that hold a trainable element. `trainable` bool, flat."""
    per_line = line // size
    padded = torch.nn.functional.pad(trainable, (0, -trainable.numel() % per_line))
    return int(padded.view(-1, per_line).any(dim=1).sum()) * line


def chosen_columns(width: int, ratio: float, generator: torch.Generator) -> torch.Tensor:
    """The trainable columns of a matrix whose frozen share is `ratio`."""
    return torch.randperm(width, generator=generator)[: width - int(ratio * width)].sort().values


def make_mask(kind: str, rows: int, width: int, ratio: float) -> tuple[ShardMask, torch.Tensor]:
    """A mask and its bool form. 'fused' is q, k, v with a column set each; rows are padded to a multiple of 16."""
    generator = torch.Generator().manual_seed(0)
    if kind == "element":
        frozen = torch.rand(rows * width, generator=generator) < ratio
        return ShardMask.from_bits((rows, width), frozen), ~frozen
    patterns = [chosen_columns(width, ratio, generator) for _ in range(3)]
    cuts = [0, rows] if kind == "column" else [rows * k // 24 for k in range(25)]
    runs = [RowRun(a, b, k % 3) for k, (a, b) in enumerate(itertools.pairwise(cuts))]
    trainable = torch.zeros(rows, width, dtype=torch.bool)
    for run in runs:
        trainable[run.start : run.stop, patterns[run.pattern]] = True
    return ShardMask.from_patterns(
        (rows, width), runs, patterns, stride=-(-max(p.numel() for p in patterns) // 16) * 16
    ), trainable.view(-1)


def measure(kind: str, mib: int, name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Gather and scatter of one shard, with the copy and the torch fallback in turn."""
    dtype, device = DTYPES[name], torch.device(args.device)
    size = dtype.itemsize
    rows = mib * 2**20 // size // args.width
    mask, trainable = make_mask(kind, rows, args.width, args.ratio)
    lines = touched(trainable, size, 32 if device.type == "cuda" else 64)
    mask = mask.to(device)
    full = torch.randn(mask.length, device=device).to(dtype)
    other = torch.empty_like(full)
    values = torch.empty(mask.size, dtype=dtype, device=device)
    compact = size * mask.numel
    work: dict[str, tuple[Callable[[], object], int]] = {
        "gather": (lambda: mask.gather(full, values), lines + compact),
        "gather torch": (lambda: kernels.torch_gather(mask, full, values), lines + compact),
        "scatter": (lambda: mask.scatter(values, other), 2 * lines + compact),
        "scatter torch": (lambda: kernels.torch_scatter(mask, values, other), 2 * lines + compact),
    }
    times = interleave({"copy": lambda: other.copy_(full), **{k: run for k, (run, _) in work.items()}}, args.rounds)
    copied = 2 * size * mask.length
    results = []
    for operation in ("gather", "scatter"):
        result = figures(operation, kind, name, mib, work[operation][1], copied)
        result |= {"useful_bytes": 2 * compact, "index_bytes": mask.nbytes}
        results.append(result | compared(result, times[operation], times[f"{operation} torch"], times["copy"]))
    return results


def measure_columns(inputs: int, name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One and three sets of columns of activations [args.tokens, inputs], into new tensors; torch is `index_select`."""
    dtype, device = DTYPES[name], torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    sets = [chosen_columns(inputs, args.ratio, generator).to(device) for _ in range(3)]
    x = torch.randn(args.tokens, inputs, device=device).to(dtype)
    other = torch.empty_like(x)
    gathers = [kernels.ColumnGather(columns, inputs, -(-columns.numel() // 16) * 16) for columns in sets]
    work: dict[str, Callable[[], object]] = {
        "copy": lambda: other.copy_(x),
        "columns": lambda: gathers[0](x),
        "columns torch": lambda: x.index_select(1, sets[0]),
        "3 sets of columns": lambda: kernels.gather_columns(gathers, x),
        "one by one, 3 sets of columns": lambda: [gather(x) for gather in gathers],
        "3 sets torch": lambda: [x.index_select(1, columns) for columns in sets],
    }
    times = interleave(work, args.rounds)
    results = []
    for operation, plain in (
        ("columns", "columns torch"),
        ("3 sets of columns", "3 sets torch"),
        ("one by one, 3 sets of columns", "3 sets torch"),
    ):
        count = 1 if operation == "columns" else 3
        moved = x.nbytes + count * args.tokens * sets[0].numel() * dtype.itemsize
        title = f"{operation} of [{args.tokens}, {inputs}]"
        result = figures(title, "-", name, x.nbytes >> 20, moved, 2 * x.nbytes)
        results.append(result | compared(result, times[operation], times[plain], times["copy"]))
    return results


def measure_sums(mib: int, name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Column sums of |w| and of squares; torch is `w.double().abs().sum(0)`."""
    dtype = DTYPES[name]
    weight = torch.randn(mib * 2**20 // dtype.itemsize // args.width, args.width).to(dtype)
    other, copied = torch.empty_like(weight), 2 * weight.numel() * dtype.itemsize
    results = []
    for operation, square in (("sum |w|", False), ("sum w*w", True)):

        def plain(square: bool = square) -> torch.Tensor:
            wide = weight.double()
            return (wide.square() if square else wide.abs()).sum(dim=0)

        def fast(square: bool = square) -> torch.Tensor:
            return kernels.column_sums(weight, square=square)

        times = interleave({"copy": lambda: other.copy_(weight), "kernel": fast, "torch": plain}, args.rounds)
        result = figures(operation, "-", name, mib, copied // 2, copied)
        results.append(result | compared(result, times["kernel"], times["torch"], times["copy"]))
    return results


def figures(operation: str, mask: str, dtype: str, mib: int, moved: int, copied: int) -> dict[str, Any]:
    """What was done, and the bytes that it and the copy moved."""
    return {
        "operation": operation,
        "mask": mask,
        "dtype": dtype,
        "shard_mib": mib,
        "bytes": moved,
        "copy_bytes": copied,
    }


def compared(result: dict[str, Any], kernel: Timing, plain: Timing, copy: Timing) -> dict[str, Any]:
    """Times of the kernel, of torch and of the copy, and shares of the copy's bytes/s."""
    moved, copied = result["bytes"], result["copy_bytes"]
    return {
        "kernel": kernel,
        "torch": plain,
        "copy": copy,
        "share": share(moved, kernel, copied, copy),
        "torch_share": share(moved, plain, copied, copy),
    }


def share(moved: int, spent: Timing, copied: int, copy: Timing) -> float:
    """Bytes/s over the copy's bytes/s."""
    return (moved / spent.median) / (copied / copy.median)


def run(args: argparse.Namespace) -> None:
    """Measure what the command line asks for, and print it."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    console = Console(width=170)
    described = machine()
    versions = ", ".join(f"{k} {v}" for k, v in described["versions"].items())
    chip = described["processor"] if args.device == "cpu" else described.get("gpu")
    console.print(f"{chip}, {torch.get_num_threads()} threads; {versions}")
    console.print(f"kernels: {kernels.backend(args.device)} {kernels.why_torch(args.device)}")
    results = [
        r for kind in args.mask for mib in args.mib for name in args.dtype for r in measure(kind, mib, name, args)
    ]
    results += [r for inputs in args.inputs for name in args.dtype for r in measure_columns(inputs, name, args)]
    if torch.device(args.device).type == "cpu":
        results += [r for mib in args.mib for name in args.dtype for r in measure_sums(mib, name, args)]
    rows = [
        [
            f"{r['operation']} {r['mask']} {r['dtype']} {r['shard_mib']} MiB",
            milliseconds(r["kernel"]),
            milliseconds(r["torch"]),
            milliseconds(r["copy"]),
            f"{r['bytes'] / r['kernel'].median / 1e9:.1f}",
            f"{r['copy_bytes'] / r['copy'].median / 1e9:.1f}",
            f"{100 * r['share']:.0f} %",
            f"{100 * r['torch_share']:.0f} %",
        ]
        for r in results
    ]
    heads = ["what", "kernel", "torch", "copy", "kernel GB/s", "copy GB/s", "share of copy", "torch's share"]
    show(console, f"ratio {args.ratio}, width {args.width}, {args.rounds} rounds", heads, rows)
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"} | {"backend": kernels.backend(args.device)}
        write_json(args.json, settings, results)
        console.print(f"written: {args.json}")
