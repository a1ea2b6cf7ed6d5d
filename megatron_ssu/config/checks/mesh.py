"""Checks of the section `parallel`: the mesh against the number of ranks."""

from __future__ import annotations

from megatron_ssu.config.checks import machine
from megatron_ssu.config.checks.unsupported import refuse_unsupported
from megatron_ssu.config.checks.values import at_least
from megatron_ssu.config.schema import RunConfig
from megatron_ssu.errors import UserError


def validate_mesh(run: RunConfig, world_size: int, *, shields: bool = True) -> int:
    """Check the mesh against `world_size` ranks; returns the number of data-parallel ranks."""
    parallel = run.parallel
    tensor, pipeline, context = parallel.tensor, parallel.pipeline, parallel.context
    for name, size in (("tensor_model", tensor), ("pipeline_model", pipeline), ("context", context)):
        at_least(f"parallel.{name}_parallel_size", size, 1)
    refuse_unsupported(run, shields)
    if not parallel.timeout_minutes > 0:
        raise UserError(f"parallel.timeout_minutes: must be above 0, got {parallel.timeout_minutes}; 30 is usual")
    model = tensor * pipeline * context
    if world_size % model:
        raise UserError(
            f"parallel: {tensor} (tensor) x {pipeline} (pipeline) x {context} (context) does not divide {world_size} "
            f"(world size); start a multiple of {model} ranks or choose sizes whose product divides {world_size}"
        )
    at_least("parallel.expert_model_parallel_size", parallel.expert, 1)
    if world_size // pipeline % parallel.expert:
        raise UserError(
            f"parallel.expert_model_parallel_size: {parallel.expert} must divide the {world_size // pipeline} ranks of a "
            "pipeline stage"
        )
    if parallel.sequence_parallel and tensor == 1:
        raise UserError(
            "parallel.sequence_parallel: true needs tensor_model_parallel_size above 1; set it to false, or raise "
            "tensor_model_parallel_size"
        )
    _virtual_pipeline(run)
    if context > 1 and not machine.transformer_engine():
        raise UserError(
            f"parallel.context_parallel_size: {context} needs CUDA and Transformer Engine, not found here; set it to 1"
        )
    if parallel.ddp.get("overlap_param_gather") and not parallel.ddp.get("overlap_grad_reduce"):
        raise UserError("parallel.ddp.overlap_param_gather: true needs overlap_grad_reduce; set that to true too")
    return world_size // model


def _virtual_pipeline(run: RunConfig) -> None:
    virtual, pipeline = run.parallel.virtual_pipeline, run.parallel.pipeline
    key = "parallel.virtual_pipeline_model_parallel_size"
    if virtual is None:
        return
    at_least(key, virtual, 1)
    if pipeline == 1:
        raise UserError(f"{key}: {virtual} needs pipeline_model_parallel_size above 1; leave it out, or raise that")
    values = run.parallel.transformer
    # megatron's batched exchange gives wrong numbers, without an error, on gloo and between two stages
    if (not machine.cuda() or pipeline == 2) and (
        values.get("batch_p2p_comm") or values.get("overlap_p2p_comm") is False
    ):
        raise UserError(
            f"parallel.overlap_p2p_comm: {virtual} virtual stages on {pipeline} (pipeline) need overlap_p2p_comm: true "
            f"and batch_p2p_comm: false here; leave both out"
        )
