"""An estimate for people and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_ssu.estimate import step_time as steps
from megatron_ssu.estimate.estimate import Estimate
from megatron_ssu.estimate.hardware import Gpu

GIB = 2**30


def to_dict(found: Estimate, gpu: Gpu | None, math: float = steps.MATH) -> dict[str, Any]:
    """For JSON; bytes, FLOPs and seconds."""
    result = asdict(found)
    for stage, entry in zip(found.stages, result["stages"], strict=True):
        entry["peak"] = stage.peak
    if gpu is not None:
        time = found.time(gpu, math)
        result["gpu"] = asdict(gpu)
        result["seconds"] = {**asdict(time), "step": time.total}
        result["fits"] = found.stages[found.fullest].peak < gpu.memory_gb * 1e9
    return result


def render(found: Estimate, gpu: Gpu | None, console: Console, math: float = steps.MATH) -> None:
    """Two tables and a few lines."""
    mesh = found.mesh
    say = lambda text: console.print(text, highlight=False, soft_wrap=True)  # noqa: E731
    say(
        f"{found.model} on {mesh.tensor} (tensor) x {mesh.pipeline} (pipeline)"
        + (f" x {mesh.virtual} (virtual)" if mesh.virtual > 1 else "")
        + f" x {mesh.data} (data)"
        + (f", {mesh.expert} (expert)" if mesh.expert > 1 else "")
        + f" = {found.world} ranks, {mesh.micro_batches} micro-batches per step"
    )
    say(
        f"{found.parameters:,} parameters, {found.frozen:,} frozen ({found.linear_ratio:.1%} of the linear layers'), "
        f"{found.parameters - found.frozen:,} trainable"
        + (f", {found.added:,} in adapters beside them" if found.added else "")
    )
    table = Table(title="GiB per rank", title_justify="left")
    for column in (
        "stage",
        "layers",
        "weights",
        "gradients",
        "optimizer",
        "copies",
        "source",
        "activations",
        "recomputed",
        "peak",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for number, stage in enumerate(found.stages):
        state = stage.state
        sizes = (state.weights, state.gradients, state.optimizer, state.gradient_copies, state.source)
        cells = [f"{size / GIB:.2f}" for size in (*sizes, stage.activations, stage.recomputed, stage.peak)]
        table.add_row(str(number), str(stage.layers), *cells, style="bold" if number == found.fullest else "")
    console.print(table)
    kinds = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in found.recompute.items())
    say(f"activations of stage {found.fullest} by recompute_granularity, GiB: {kinds}")
    work, traffic = found.work, found.traffic
    say(
        f"a step of {found.tokens:,} tokens, on a rank of the busiest stage: {work.total / 1e12:.1f} TFLOP "
        f"({(work.full - work.gemms) / 1e12:.1f} saved by frozen columns and rows, {work.recomputed / 1e12:.1f} recomputed"
        + (f", {work.source / 1e12:.1f} of the source's forward pass" if work.source else "")
        + f"; {work.gather / 1e9:.1f} GB read and written to gather the others)"
    )
    say(
        f"sent by a rank in a step, GB: tensor {traffic.tensor / 1e9:.2f}, pipeline {traffic.pipeline / 1e9:.2f}, "
        f"data {traffic.data / 1e9:.2f}" + (f", expert {traffic.expert / 1e9:.2f}" if traffic.expert else "")
    )
    host = found.host
    say(
        f"a checkpoint: {host.stored / 1e9:.1f} GB on disk; host memory on a node of {host.ranks} ranks, GiB: "
        f"{host.saving / GIB:.1f} while one is written{', beside the training' if host.background else ''}, "
        f"{host.loading / GIB:.1f} while one is loaded"
    )
    say(
        f"import and export: at most {host.importing / GIB:.2f} and {host.exporting / GIB:.2f} GiB of host memory on a node, "
        f"beside the system's cache; {host.files} files, written by {host.writers} ranks"
    )
    if gpu is None:
        return
    need, have = found.stages[found.fullest].peak, gpu.memory_gb * 1e9
    say(
        f"{gpu.name}: {'fits' if need < have else 'does not fit'}: {need / GIB:.1f} of {have / GIB:.1f} GiB, without the "
        "libraries' own (some GiB) and fragmentation"
    )
    time = found.time(gpu, math)
    parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in asdict(time).items() if seconds or name != "expert")
    say(
        f"{gpu.name}: about {time.total:.2f} s per step, {found.tokens / time.total:,.0f} tokens/s "
        f"({parts}; GEMMs at {math:.0%} of the peak)"
    )
