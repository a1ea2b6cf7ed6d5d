"""Gather, scatter and column sums: bytes a second against a memory copy on the same machine, in the same run."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
from common import Timing, interleave, machine, milliseconds, show, write_json
from rich.console import Console

from megatron_ssu.shield import kernels
from megatron_ssu.shield.shards import RowRun, ShardMask

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def touched(trainable: torch.Tensor, size: int, line: int) -> int:
    """Bytes of the lines that hold a trainable element. `trainable` bool, flat."""
    per_line = line // size
    padded = torch.nn.functional.pad(trainable, (0, -trainable.numel() % per_line))
    return int(padded.view(-1, per_line).any(dim=1).sum()) * line


def make_mask(kind: str, rows: int, width: int, ratio: float) -> tuple[ShardMask, torch.Tensor]:
    """A mask of a shard that ends within rows, and its bool form. 'fused' is q, k, v with a column set each."""
    generator = torch.Generator().manual_seed(0)
    start, end = 7, rows * width - 11
    if kind == "element":
        frozen = torch.rand(rows * width, generator=generator) < ratio
        return ShardMask.from_bits((rows, width), frozen, start, end), ~frozen[start:end]
    count = width - int(ratio * width)
    patterns = [torch.randperm(width, generator=generator)[:count].sort().values for _ in range(3)]
    cuts = [0, rows] if kind == "column" else [rows * k // 24 for k in range(25)]
    runs = [RowRun(a, b, k % 3) for k, (a, b) in enumerate(itertools.pairwise(cuts))]
    trainable = torch.zeros(rows, width, dtype=torch.bool)
    for run in runs:
        trainable[run.start : run.stop, patterns[run.pattern]] = True
    return ShardMask.from_patterns((rows, width), runs, patterns, start, end), trainable.view(-1)[start:end]


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
    values = torch.empty(mask.numel, device=device)
    work: dict[str, tuple[Callable[[], object], int]] = {
        "gather": (lambda: mask.gather(full, values), lines + 4 * mask.numel),
        "gather torch": (lambda: kernels.torch_gather(mask, full, values), lines + 4 * mask.numel),
        "scatter": (lambda: mask.scatter(values, other), 2 * lines + 4 * mask.numel),
        "scatter torch": (lambda: kernels.torch_scatter(mask, values, other), 2 * lines + 4 * mask.numel),
    }
    times = interleave({"copy": lambda: other.copy_(full), **{k: run for k, (run, _) in work.items()}}, args.rounds)
    copied = 2 * size * mask.length
    results = []
    for operation in ("gather", "scatter"):
        moved = work[operation][1]
        results.append(
            {
                "operation": operation,
                "mask": kind,
                "dtype": name,
                "shard_mib": mib,
                "bytes": moved,
                "useful_bytes": mask.numel * (size + 4),
                "copy_bytes": copied,
                "index_bytes": mask.nbytes,
                "kernel": times[operation],
                "torch": times[f"{operation} torch"],
                "copy": times["copy"],
                "share": share(moved, times[operation], copied, times["copy"]),
                "torch_share": share(moved, times[f"{operation} torch"], copied, times["copy"]),
            }
        )
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
        moved = copied // 2
        results.append(
            {
                "operation": operation,
                "mask": "-",
                "dtype": name,
                "shard_mib": mib,
                "bytes": moved,
                "copy_bytes": copied,
                "kernel": times["kernel"],
                "torch": times["torch"],
                "copy": times["copy"],
                "share": share(moved, times["kernel"], copied, times["copy"]),
                "torch_share": share(moved, times["torch"], copied, times["copy"]),
            }
        )
    return results


def share(moved: int, spent: Timing, copied: int, copy: Timing) -> float:
    """Bytes/s over the copy's bytes/s."""
    return (moved / spent.median) / (copied / copy.median)


def run(args: argparse.Namespace) -> None:
    """Measure what the command line asks for, and print it."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    console = Console(width=150)
    described = machine()
    versions = ", ".join(f"{k} {v}" for k, v in described["versions"].items())
    chip = described["processor"] if args.device == "cpu" else described.get("gpu")
    console.print(f"{chip}, {torch.get_num_threads()} threads; {versions}")
    console.print(f"kernels: {kernels.backend(args.device)} {kernels.why_torch(args.device)}")
    results = [
        r for kind in args.mask for mib in args.mib for name in args.dtype for r in measure(kind, mib, name, args)
    ]
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
