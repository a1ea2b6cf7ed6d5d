"""Adapters as a directory that Hugging Face's PEFT loads: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_ssu.adapters.adapters import Adapters
from megatron_ssu.adapters.settings import AdapterSettings
from megatron_ssu.engine.ranks import on_rank_zero
from megatron_ssu.errors import UserError
from megatron_ssu.models.collect import Collector
from megatron_ssu.models.hub import is_pinned, parts
from megatron_ssu.models.matrix import Matrix
from megatron_ssu.models.parallel_model import ParallelModel

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_peft(adapters: Adapters, folder: Path, *, whole: Iterable[str] = ()) -> None:
    """Write `folder`, whole or not at all, in place of one that is there; rank 0 writes. Collective.

    Tensors have the model's dtype, DoRA's magnitudes are fp32. `whole`: kinds of matrices outside the layers that trained
    as a whole, which PEFT calls modules to save.

    Raises:
        UserError: `folder` cannot be written.
    """
    model = adapters.model
    tensors = adapters.peft_tensors()
    tensors |= _whole_tensors(model, frozenset(whole))
    on_rank_zero(lambda: _write(folder, peft_config(model, adapters.settings, tensors), tensors))


def peft_config(model: ParallelModel, settings: AdapterSettings, tensors: Iterable[str]) -> dict[str, Any]:
    """adapter_config.json for adapters whose `tensors` have these names."""
    names = [name.removeprefix(PREFIX) for name in tensors]
    adapted = {name.removesuffix(".lora_A.weight") for name in names if name.endswith(".lora_A.weight")}
    family, dims = model.source.family, model.source.dims
    path = model.run.model.path
    base, revision = parts(path) if is_pinned(path) else (path, None)
    possible = {_module(m) for m in family.matrices(dims) if m.kind in settings.targets}
    saved = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in names if ".lora_" not in name})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": settings.rank,
        "lora_alpha": int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted(settings.targets if adapted == possible else adapted),
        "modules_to_save": saved or None,
        "use_dora": settings.dora,
        "use_rslora": settings.rslora,
    }


def _module(matrix: Matrix) -> str:
    return matrix.name.removesuffix(".weight")


def _whole_tensors(model: ParallelModel, kinds: frozenset[str]) -> dict[str, torch.Tensor]:
    """The model's matrices of `kinds` under PEFT's names, on rank 0's CPU; empty on the others. A tied head is the embedding.

    Collective.
    """
    if not kinds:
        return {}
    family, mesh = model.source.family, model.mesh
    found: dict[str, torch.Tensor] = {}
    wanted = [(m, model.config.params_dtype) for m in family.matrices(model.source.dims) if m.kind in kinds]
    for matrix, tensor in Collector(model.layout, mesh).each(wanted):
        names = [matrix.name]
        if model.source.dims.tied and matrix.kind == "embedding":
            names += [t for entry in family.edges if entry.kinds == ("head",) for t in entry.tensors]
        if mesh.rank == 0:
            found |= {PREFIX + n: tensor.clone() for n in names}
    return found


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name in (WEIGHTS, CONFIG):
            with (partial / name).open("rb") as stream:
                os.fsync(stream.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:  # the latter for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{folder}: cannot be written ({error}); name a directory that can be written") from error
