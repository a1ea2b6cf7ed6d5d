"""Checks of the section `precision`."""

from __future__ import annotations

from megatron_ssu.config.checks import machine
from megatron_ssu.config.coerce import show
from megatron_ssu.config.schema import RunConfig
from megatron_ssu.errors import UserError


def validate_precision(run: RunConfig) -> None:
    """Check that the requested precision is available on this machine."""
    values = run.precision.transformer
    for name in ("fp8", "fp4"):
        if values.get(name) is not None:
            if not machine.transformer_engine():
                raise UserError(
                    f"precision.{name}: {values[name]!r} needs CUDA and Transformer Engine; leave it out here"
                )
            if run.precision.dtype != "bf16":
                raise UserError(
                    f"precision.{name}: {values[name]!r} needs precision.dtype: bf16, not {run.precision.dtype}"
                )
    recipe = values.get("fp8_recipe") or "delayed"
    for name in ("fp8_dot_product_attention", "fp8_multi_head_attention"):
        if values.get(name) and getattr(recipe, "value", recipe) != "delayed":
            raise UserError(
                f"precision.{name}: must go with precision.fp8_recipe: delayed, got {show(recipe)}: attention's scales are "
                "delayed ones under every recipe, and a run that resumes under another would lose them"
            )
    if values.get("fp8") and values.get("fp4"):
        raise UserError("precision.fp4: does not go with precision.fp8; leave one of them out")


def validate_fp8_shapes(run: RunConfig, sizes: dict[str, int]) -> None:
    """FP8 GEMM dimensions must be multiples of 16."""
    if not run.precision.transformer.get("fp8"):
        return
    tensor, context = run.parallel.tensor, run.parallel.context
    for name in ("hidden_size", "intermediate_size"):
        if sizes[name] // tensor % 16:
            raise UserError(
                f"precision.fp8: {sizes[name]} ({name} in config.json) over {tensor} (tensor) must be a multiple of 16; "
                "lower parallel.tensor_model_parallel_size, or leave precision.fp8 out"
            )
    parts = context * (tensor if run.parallel.sequence_parallel else 1)
    tokens = run.data.sequence_length * run.train.micro_batch_size // parts
    if tokens % 16:
        raise UserError(
            f"precision.fp8: tokens per rank and micro-batch must be a multiple of 16, got {tokens}; change "
            "data.sequence_length or train.micro_batch_size"
        )
