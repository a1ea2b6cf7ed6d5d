"""Import and export of a Hugging Face directory: bytes per second, and memory beside the rank's own shard."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from common import show, write_json
from rich.console import Console
from safetensors.torch import save_file

from megatron_ssu.config.schema import CheckpointSection, ModelSection, ParallelSection, PrecisionSection, RunConfig
from megatron_ssu.engine.device import has_cuda
from megatron_ssu.engine.mesh import stop_processes
from megatron_ssu.models.families import family_of
from megatron_ssu.models.family import Dims, Family
from megatron_ssu.models.hf_export import export_model
from megatron_ssu.models.hf_files import INDEX_FILE, HFCheckpoint
from megatron_ssu.models.hf_import import import_weights
from megatron_ssu.models.matrix import Matrix
from megatron_ssu.models.parallel_model import open_model, open_source

GIB = 2**30
LIMIT_GIB = 0.5  # beside a rank's shard


def run(options: argparse.Namespace) -> None:
    """Measure what the command line asks for, and print it."""
    if options.rank:
        one_rank(options, *options.rank)
        return
    console = Console(width=130)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model = make_model(options, Path(folder) / "model")
        cases = list(itertools.product(options.tensor, options.data, options.writers))
        found = [measure(options, model, case, Path(folder)) for _ in range(options.rounds) for case in cases]
        results = summary(model, found)
    columns = ("what", "tensor", "data", "writers", "s", "GB/s", "spread", "beside the shard, GiB")
    rows = [
        (
            *(r[key] for key in ("what", "tensor", "data", "writers")),
            f"{r['model_gb'] / r['gbps']:.2f}",
            f"{r['gbps']:.2f}",
            f"{r['low']:.2f}-{r['high']:.2f}",
            r["beside_gib"],
        )
        for r in results
    ]
    show(
        console,
        f"{results[0]['model_gb']} GB in bf16, medians of {options.rounds}; all copies bit-identical",
        columns,
        rows,
    )
    if options.json:
        write_json(options.json, {k: v for k, v in vars(options).items() if k not in ("json", "rank")}, results)
    over = [f"{r['what']} at tensor {r['tensor']}" for r in results if r["beside_gib"] > LIMIT_GIB]
    sys.exit(f"over the limit: {', '.join(over)}" if over else 0)


def make_model(options: argparse.Namespace, directory: Path) -> Path:
    """Random bf16 files of the config's model, else of an OLMo-2, with as many layers as the size asks for."""
    hf = (
        json.loads(options.config.read_text())
        if options.config
        else {
            "model_type": "olmo2",
            "architectures": ["Olmo2ForCausalLM"],
            "hidden_size": options.hidden,
            "intermediate_size": options.hidden * 11 // 4,
            "num_attention_heads": options.hidden // 128,
            "num_key_value_heads": options.hidden // 128,
            "vocab_size": options.vocab,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
        }
    )
    for per_layer in ("layer_types", "max_window_layers"):
        hf.pop(per_layer, None)
    hf["num_hidden_layers"] = 1
    family, size = family_of(hf), options.gb * 1e9 / 2
    one, two = (elements(family, hf, layers) for layers in (1, 2))
    hf["num_hidden_layers"] = 1 + max(0, round((size - one) / (two - one)))
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(hf))
    draw, weight_map, total = torch.Generator().manual_seed(0), {}, 0
    layers = itertools.groupby(family.matrices(Dims.from_hf(hf)), key=lambda m: m.layer)
    for number, (_, matrices) in enumerate(layers):
        tensors = {m.name: torch.randn(m.shape, generator=draw).bfloat16() for m in matrices}
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, directory / file)
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(t.nbytes for t in tensors.values())
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return directory


def elements(family: Family, hf: dict[str, Any], layers: int) -> int:
    """Weights of the model with so many layers."""
    return sum(m.elements for m in family.matrices(Dims.from_hf({**hf, "num_hidden_layers": layers})))


def measure(options: argparse.Namespace, model: Path, case: tuple[int, int, int], folder: Path) -> dict[str, Any]:
    """Import and export by ranks of their own; the worst rank's memory, the slowest rank's time."""
    output = folder / "copy"
    tensor, data, writers = case
    if options.cold:
        for file in model.glob("*.safetensors"):
            drop_cached(file)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(tensor * data)]
    child = [sys.argv[0], "--tensor", str(tensor), "--writers", str(writers), "--shard-gb", str(options.shard_gb)]
    child += ["--rank", str(model), str(output)]
    subprocess.run([sys.executable, *launch, *child], check=True, stderr=subprocess.DEVNULL)
    compare(HFCheckpoint(model), HFCheckpoint(output))
    shutil.rmtree(output)
    ranks = [json.loads((folder / f"copy.rank{rank}").read_text()) for rank in range(tensor * data)]
    worst = {key: max(r[key] for r in ranks) for key in ranks[0]}
    return {"tensor": tensor, "data": data, "writers": writers or "all", **worst}


def drop_cached(file: Path) -> None:
    """Let the system forget a file's content, which is on the disk."""
    handle = os.open(file, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def compare(source: HFCheckpoint, copy: HFCheckpoint) -> None:
    """Raises RuntimeError where a tensor differs."""
    if source.names() != copy.names():
        raise RuntimeError("the copy has other tensors")
    for name in source.names():
        if not np.array_equal(source.raw(name), copy.raw(name)):
            raise RuntimeError(f"{name} differs")


def one_rank(options: argparse.Namespace, model: Path, output: Path) -> None:
    """What every rank does; its figures go to OUTPUT.rankN."""
    run = RunConfig(
        model=ModelSection(path=str(model)),
        checkpoint=CheckpointSection(directory="unused"),
        precision=PrecisionSection(dtype="bf16"),
        parallel=ParallelSection(transformer={"tensor_model_parallel_size": options.tensor[0]}),
    )
    source = open_source(model)
    session = open_model(run, source, load=False)
    for chunk in session.chunks:
        for param in chunk.parameters():
            param.data.zero_()  # now all pages of the shard are there
    size, limit = round(options.shard_gb * 1e9), {"writers": options.writers[0]} if options.writers[0] else {}
    dist.barrier()
    with Watched() as reading:
        import_weights(session.layout, source.checkpoint)
        dist.barrier()
    with Watched() as writing:
        export_model(session.layout, session.mesh, source.checkpoint, output, size, **limit)
    figures = {
        "import_seconds": reading.seconds,
        "import_beside": reading.beside,
        "export_seconds": writing.seconds,
        "export_beside": writing.beside,
        "gpu_beside": max(reading.gpu, writing.gpu),
    }
    output.with_name(f"{output.name}.rank{session.mesh.rank}").write_text(json.dumps(figures))
    stop_processes()


@dataclass
class Watched:
    """Context that times its body and samples this process's memory."""

    seconds: float = 0.0
    beside: int = 0  # bytes above those at the beginning
    gpu: int = 0

    def __enter__(self) -> Watched:
        self._begin, self._base, self._done = time.perf_counter(), held(), threading.Event()
        if has_cuda():
            torch.cuda.reset_peak_memory_stats()
            self._gpu_base = torch.cuda.memory_allocated()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.002):
            self.beside = max(self.beside, held() - self._base)

    def __exit__(self, *error: object) -> None:
        if has_cuda():
            torch.cuda.synchronize()
            self.gpu = torch.cuda.max_memory_allocated() - self._gpu_base
        self.seconds = time.perf_counter() - self._begin
        self._done.set()
        self._thread.join()


def held() -> int:
    """Bytes of anonymous and shared pages of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def summary(model: Path, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each direction and mesh."""
    matrices: list[Matrix] = list(open_source(model).family.matrices(open_source(model).dims))
    size = 2 * sum(m.elements for m in matrices)
    rows = []
    for tensor, data, writers in dict.fromkeys((f["tensor"], f["data"], f["writers"]) for f in found):
        for what in ("import", "export"):
            own = [f for f in found if (f["tensor"], f["data"], f["writers"]) == (tensor, data, writers)]
            speeds = [size / f[f"{what}_seconds"] / 1e9 for f in own]
            low, middle, high = np.percentile(speeds, (25, 50, 75))
            rows.append(
                {
                    "what": what,
                    "tensor": tensor,
                    "data": data,
                    "writers": writers if what == "export" else "",
                    "model_gb": round(size / 1e9, 2),
                    "gbps": float(middle),
                    "low": float(low),
                    "high": float(high),
                    "beside_gib": round(max(f[f"{what}_beside"] for f in own) / GIB, 3),
                    "gpu_beside_gib": round(max(f["gpu_beside"] for f in own) / GIB, 3),
                    "limit_gib": LIMIT_GIB,
                }
            )
    return rows
