"""What the ranks of the tests for large models do: import and export with their parts watched or broken."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core.models.backends import LocalSpecProvider

from megatron_ssu.config.schema import RunConfig
from megatron_ssu.engine import replicas
from megatron_ssu.models import collect, hf_export, hf_import
from megatron_ssu.models.parallel_model import ParallelModel, open_model
from megatron_ssu.models.shard_writer import ShardWriter
from megatron_ssu.models.source import open_source
from tests.dist.context_work import GatheredAttention
from tests.dist.work import export, logits_of, run_config


def make_run(model: str, parallel: dict[str, Any], transformer: dict[str, Any] | None = None) -> RunConfig:
    run = run_config(model, parallel)
    run.model.transformer.update(transformer or {})
    return run


def small_portions(size: int) -> None:
    """Let this process read, send and write so many bytes at a time."""
    hf_import.PORTION = hf_export.PORTION = collect.PORTION = replicas.BUCKET = size  # type: ignore[misc]


def read_parameters(model: str, parallel: dict[str, Any], size: int) -> dict[str, Any]:
    """Import; names of the parameters that this rank read, of all that it has, and their digest."""
    small_portions(size)
    read: list[str] = []
    stock = hf_import.fill

    def watched(shard: torch.Tensor, local: Any, checkpoint: Any) -> None:
        read.append(local.name)
        stock(shard, local, checkpoint)

    hf_import.fill = watched
    attention: Any = nullcontext()
    if "context_parallel_size" in parallel:  # megatron's own cannot do it
        attention = mock.patch.object(LocalSpecProvider, "core_attention", lambda self: GatheredAttention)
    with attention:
        session = open_model(run_config(model, parallel))
    digest = hashlib.sha256()
    for local in session.layout:
        digest.update(local.param.detach().numpy().tobytes())
    place = (session.mesh.tensor_rank, session.mesh.pipeline_rank)
    return {"read": read, "all": [p.name for p in session.layout], "digest": digest.hexdigest(), "place": place}


def lose_a_file(model: str, parallel: dict[str, Any], loser: int) -> None:
    """Import from a copy of the model that lost its weights, on rank `loser`, after their headers were read."""
    rank = int(torch.distributed.get_rank())
    copy = Path(f"{model}-{rank}")
    shutil.copytree(model, copy)
    source = open_source(copy)
    if rank == loser:
        (copy / "model.safetensors").unlink()
    open_model(run_config(str(copy), parallel), source)


def export_by(
    model: str, parallel: dict[str, Any], target: str, shard: int, size: int, writers: int | None
) -> list[str]:
    """Import and export; the files that this rank wrote."""
    small_portions(size)
    session = open_model(run_config(model, parallel))
    return _export(session, Path(target), shard, writers)


def _export(session: ParallelModel, target: Path, shard: int, writers: int | None = None) -> list[str]:
    written: list[str] = []
    stock = ShardWriter.begin

    def watched(self: ShardWriter, name: str, tensors: Any) -> None:
        written.append(name)
        stock(self, name, tensors)

    ShardWriter.begin = watched  # type: ignore[method-assign]
    hf_export.export_model(session.layout, session.mesh, session.source.checkpoint, target, shard, writers=writers)
    return written


def count_exchanges(model: str, parallel: dict[str, Any], target: str) -> int:
    """Import and export into one file; how often the ranks exchanged messages for it."""
    session = open_model(run_config(model, parallel))
    stock = torch.distributed.all_to_all_single
    with mock.patch.object(torch.distributed, "all_to_all_single", side_effect=stock) as exchange:
        export(session, target)
    return exchange.call_count


def export_with_a_limit(model: str, target: str, shard: int, limited: int, limit: int) -> None:
    """Export; rank `limited` cannot write files of more than `limit` bytes."""
    session = open_model(run_config(model, {}))
    if session.mesh.rank == limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    _export(session, Path(target), shard)


def export_on_own_disks(model: str, folder: str, shard: int, shared: list[int]) -> list[str]:
    """Export to a relative path; ranks that are not `shared` are in a folder of their own, as on a disk of their own."""
    session = open_model(run_config(model, {}))
    rank = session.mesh.rank
    place = Path(folder) / ("shared" if rank in shared else f"own{rank}")
    place.mkdir(exist_ok=True)
    os.chdir(place)
    return _export(session, Path("out"), shard)


def uneven(run: RunConfig, ids: torch.Tensor, target: str) -> tuple[int, torch.Tensor | None]:
    """Import, export, and logits: layers of this rank; logits on the first rank of the last stage."""
    session = open_model(run)
    export(session, target)
    layers = sum(len(chunk.decoder.layers) for chunk in session.chunks)
    return layers, logits_of(session, ids)
