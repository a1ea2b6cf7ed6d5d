"""What commands that run a model on a mesh begin with."""

from __future__ import annotations

from typing import Any

from megatron_ssu.commands.megatron_source import take_megatron_source
from megatron_ssu.config.schema import RunConfig
from megatron_ssu.config.validate import validate_run
from megatron_ssu.engine.mesh import start_processes, world_size
from megatron_ssu.engine.ranks import on_all_ranks
from megatron_ssu.methods.base import Method
from megatron_ssu.models.build import DTYPES, has_transformer_engine, transformer_config
from megatron_ssu.models.families import read_family
from megatron_ssu.models.hf_config import normalised, read_hf_config
from megatron_ssu.models.hf_import import check_checkpoint
from megatron_ssu.models.limits import check_adapters, check_limits, check_method
from megatron_ssu.models.rope import ropes
from megatron_ssu.models.source import Source, open_source
from megatron_ssu.train.regularizers import check_regularizers


def check_run(run: RunConfig, method: Method, *, training: bool = True, writing: bool = True) -> Source:
    """Everything that can be checked without weights, before any process group is made. Raises UserError.

    Without `training` the settings of the training loop are not checked, without `writing` nor are the method and its shield.
    """
    source = open_source(run.model.path)
    ropes(source.hf, run.model.path)
    check_settings(run, method, source.hf, world_size(), training=training, writing=writing)
    check_checkpoint(source.checkpoint, source.family, source.dims, DTYPES[run.precision.dtype])
    return source


def check_settings(
    run: RunConfig, method: Method, hf: dict[str, Any], world: int, *, training: bool = True, writing: bool = True
) -> None:
    """The run file against `world` ranks and the model's config.json `hf`; see `check_run`."""
    family, dims = read_family(hf, run.model.path)
    validate_run(run, world, hf, training=training, writing=writing, shields=method.shields)
    if training:
        check_regularizers(run.train.regularize, method)
    check_limits(run, family, dims, family.scales(normalised(hf)), transformer_engine=has_transformer_engine())
    check_method(method.name, dims, experts=method.experts)
    if method.adapts:
        check_adapters(run, family, dims)
    transformer_config(run, family, hf, dims)  # what is left, megatron-core itself refuses
    if writing:
        method.validate(run, list(family.matrices(dims)))
        method.validate_files(run)


def take_source(run: RunConfig, method: Method, *, training: bool, writing: bool = True) -> None:
    """Join the ranks, and have model.path name a Hugging Face directory if it is a Megatron checkpoint. Collective."""
    start_processes(run.parallel.timeout_minutes)

    def check(described: RunConfig) -> None:
        hf = read_hf_config(described.model.path, "model.hf_path")
        check_settings(described, method, hf, world_size(), training=training, writing=writing)

    take_megatron_source(run, check)


def start(run: RunConfig, method: Method, *, training: bool, writing: bool = True) -> Source:
    """Join the ranks and check the run file; all ranks get through, or none."""
    take_source(run, method, training=training, writing=writing)
    return on_all_ranks(lambda: check_run(run, method, training=training, writing=writing))
