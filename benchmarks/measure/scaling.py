"""Predicted step time and traffic of full fine-tuning and SSU on 8 to 1024 GPUs: a model, not a measurement."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import show, write_json
from rich.console import Console

from megatron_ssu.config.schema import (
    CheckpointSection,
    DataSection,
    MethodSection,
    ModelSection,
    ParallelSection,
    RunConfig,
    ShieldSection,
    TrainSection,
)
from megatron_ssu.errors import UserError
from megatron_ssu.estimate import step_time as steps
from megatron_ssu.estimate.estimate import Estimate, estimate
from megatron_ssu.estimate.hardware import Gpu, gpu_named

# Hidden size, MLP width, layers, heads, key/value heads of OLMo-2's published configurations; all have 100,352 tokens.
SHAPES = {"7B": (4096, 11008, 32, 32, 32), "13B": (5120, 13824, 40, 40, 40), "32B": (5120, 27648, 64, 40, 8)}
WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)
DATA = (1, 8, 64)  # data-parallel ranks of the table of bytes
ROOM = 0.85  # of the memory: the rest is the libraries' and fragmentation


def run(options: argparse.Namespace) -> None:
    """Measure what the command line asks for, and print it."""
    gpu = gpu_named(options.gpu)
    math = measured_fraction(options.measured) if options.measured else steps.MATH
    console = Console(width=170)
    counted = [state(options, data) for data in DATA]
    title = f"OLMo-2-{options.model}, ratio {options.ratio}, bf16: bytes on a rank, SSU over FFT. Counted."
    show(console, title, list(counted[0]), [[cell(value) for value in entry.values()] for entry in counted])
    rows, results = [], []
    for world in WORLDS:
        found = {method: fastest(options, method, world, gpu, math) for method in ("none", "ssu")}
        if None in found.values():
            rows.append([world, "does not fit", *[""] * 8])
            continue
        plain, shielded = found["none"], found["ssu"]
        assert plain is not None and shielded is not None
        rows.append(row(world, plain, shielded, gpu, math))
        results.append({"world": world, **{m: facts(e, gpu, math) for m, e in found.items() if e is not None}})
    heads = [
        "GPUs",
        "TxPxD, micro",
        "FFT s",
        "TxPxD, micro",
        "SSU s",
        "SSU/FFT",
        "tokens/s",
        "GiB",
        "sent GB (T/P/D)",
        "not GEMMs",
    ]
    title = (
        f"OLMo-2-{options.model}, {gpu.name}, {options.batch} x {options.length} tokens per step, ratio {options.ratio}; "
        f"GEMMs at {math:.0%} of the peak. Predicted."
    )
    show(console, title, heads, rows)
    if options.json:
        write_json(
            options.json, {k: v for k, v in vars(options).items() if k != "json"} | {"math": math}, [*counted, *results]
        )


def measured_fraction(file: Path) -> float:
    """The fraction of the peak that the measured stock step reached."""
    document = json.loads(file.read_text())
    stock = next(result for result in document["results"] if result["what"] == "stock")
    return float(stock["MFU %"]) / 100


def meshes(world: int) -> Iterator[tuple[int, int, int, int]]:
    """Tensor (within a node), pipeline, virtual stages, micro-batch."""
    for tensor in (1, 2, 4, 8):
        for pipeline in (1, 2, 4):
            if world % (tensor * pipeline) == 0:
                for micro in (1, 2, 4):
                    yield tensor, pipeline, 1, micro
                    if pipeline > 1:
                        yield tensor, pipeline, 2, micro


def state(options: argparse.Namespace, data: int) -> dict[str, float | None]:
    """Bytes of model state, exchange and optimizer step on one of `data` ranks that share nothing else, and over FFT's."""
    plain, shielded = (counts(options, method, data, (1, 1, 1, 1)) for method in ("none", "ssu"))
    full, own = plain.stages[0].state.lasting, shielded.stages[0].state.lasting
    sent, exchanged = plain.traffic.data, shielded.traffic.data
    return {
        "data parallel": data,
        "state, FFT, GB": full / 1e9,
        "state, SSU, GB": own / 1e9,
        "state": own / full,
        "reduced and gathered, FFT, GB": sent / 1e9,
        "reduced and gathered, SSU, GB": exchanged / 1e9,
        "reduced and gathered": exchanged / sent if sent else None,
        "optimizer step": shielded.optimizer_bytes / plain.optimizer_bytes,
    }


def cell(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.1f}" if value >= 2 else f"{value:.3f}"


def fastest(options: argparse.Namespace, method: str, world: int, gpu: Gpu, math: float) -> Estimate | None:
    """The estimate of the fastest mesh that fits; None where none does."""
    best: Estimate | None = None
    for mesh in meshes(world):
        try:
            found = counts(options, method, world, mesh)
        except UserError:  # a mesh that this model or batch cannot have
            continue
        fits = found.stages[found.fullest].peak < ROOM * gpu.memory_gb * 1e9
        if fits and (best is None or found.time(gpu, math).total < best.time(gpu, math).total):
            best = found
    return best


def counts(options: argparse.Namespace, method: str, world: int, mesh: tuple[int, int, int, int]) -> Estimate:
    """The estimate of one mesh; UserError where model or batch cannot have it."""
    hidden, ffn, layers, heads, groups = SHAPES[options.model]
    hf: dict[str, Any] = {
        "model_type": "olmo2",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": 100352,
        "max_position_embeddings": options.length,
        "tie_word_embeddings": False,
    }
    tensor, pipeline, virtual, micro = mesh
    parallel: dict[str, Any] = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    parallel["sequence_parallel"] = tensor > 1
    if virtual > 1:
        parallel["virtual_pipeline_model_parallel_size"] = virtual
    run = RunConfig(
        model=ModelSection(path=f"OLMo-2-{options.model}"),
        parallel=ParallelSection(transformer=parallel, ddp={"overlap_grad_reduce": True, "overlap_param_gather": True}),
        method=MethodSection(name=method),
        shield=ShieldSection(ratio=options.ratio),
        data=DataSection(sequence_length=options.length),
        train=TrainSection(micro_batch_size=micro, global_batch_size=options.batch),
        checkpoint=CheckpointSection(directory="unused"),
    )
    return estimate(run, hf, world, engine=True)


def row(world: int, plain: Estimate, shielded: Estimate, gpu: Gpu, math: float) -> list[object]:
    full, own = plain.time(gpu, math), shielded.time(gpu, math)
    traffic = shielded.traffic
    return [
        world,
        mesh_name(plain),
        f"{full.total:.2f}",
        mesh_name(shielded),
        f"{own.total:.2f}",
        f"{own.total / full.total:.3f}",
        f"{shielded.tokens / own.total:,.0f}",
        f"{shielded.stages[shielded.fullest].peak / 2**30:.0f}",
        f"{traffic.tensor / 1e9:.0f}/{traffic.pipeline / 1e9:.0f}/{traffic.data / 1e9:.0f}",
        f"{1 - own.gemms / own.total:.0%}",
    ]


def mesh_name(found: Estimate) -> str:
    mesh = found.mesh
    pipeline = f"{mesh.pipeline}" + (f"v{mesh.virtual}" if mesh.virtual > 1 else "")
    micro = round(found.sequences / (mesh.data * mesh.micro_batches))
    return f"{mesh.tensor}x{pipeline}x{mesh.data}, {micro}"


def facts(found: Estimate, gpu: Gpu, math: float) -> dict[str, Any]:
    return {"mesh": mesh_name(found), "seconds": asdict(found.time(gpu, math)), "traffic": asdict(found.traffic)}
