"""Checks of the section `model`: the model of config.json against the mesh and the sequence length."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron_ssu.config.checks import machine
from megatron_ssu.config.checks.model_sizes import model_sizes
from megatron_ssu.config.checks.precision import validate_fp8_shapes
from megatron_ssu.config.checks.values import at_least
from megatron_ssu.config.coerce import show
from megatron_ssu.config.schema import RunConfig
from megatron_ssu.errors import UserError

RECOMPUTE_MODULES = ("core_attn", "mlp", "layernorm")


def validate_model(run: RunConfig, hf: dict[str, Any], *, training: bool = True) -> None:
    """Check the model of config.json (`hf`) against the mesh and the sequence length."""
    sizes = model_sizes(hf, str(Path(run.model.path) / "config.json"))
    _tensor_parallel(run, sizes)
    _layers(run, sizes["num_hidden_layers"])
    _recompute(run, sizes["num_hidden_layers"])
    _lengths(run, sizes["max_position_embeddings"], training)
    if training:
        validate_fp8_shapes(run, sizes)


def _tensor_parallel(run: RunConfig, sizes: dict[str, int]) -> None:
    tensor, padding = run.parallel.tensor, run.model.make_vocab_size_divisible_by
    split = ("num_attention_heads", "hidden_size", "intermediate_size")
    common, groups = math.gcd(*(sizes[name] for name in split)), sizes["num_key_value_heads"]
    for name in (*split, "num_key_value_heads"):
        # More ranks than key/value heads share a head among as many of them.
        if sizes[name] % tensor and not (name == "num_key_value_heads" and tensor % groups == 0):
            fits = [n for n in range(1, min(common, 128) + 1) if common % n == 0 and not (groups % n and n % groups)]
            would_do = ", ".join(map(str, fits))
            raise UserError(
                f"parallel.tensor_model_parallel_size: {tensor} does not divide {sizes[name]} ({name} in config.json); "
                f"choose one of {would_do}"
            )
    at_least("model.make_vocab_size_divisible_by", padding, 1)
    if padding % tensor:
        raise UserError(
            f"model.make_vocab_size_divisible_by: must be a multiple of {tensor} (tensor), so that the padded "
            f"vocabulary splits evenly, got {padding}; {math.lcm(padding, tensor)} would do"
        )


def _layers(run: RunConfig, layers: int) -> None:
    """Every pipeline stage, and every virtual stage of it, must get the same number of layers or what was asked for."""
    values, stages, virtual = run.model.transformer, run.parallel.pipeline, run.parallel.virtual_pipeline or 1
    ends = [f"num_layers_in_{end}_pipeline_stage" for end in ("first", "last")]
    given = {name: values[name] for name in ends if values.get(name) is not None}
    extra = [n for n in ("embedding", "loss") if values.get(f"account_for_{n}_in_pipeline_split")]
    if given and extra:
        raise UserError(
            f"model.account_for_{extra[0]}_in_pipeline_split: does not go with {next(iter(given))}; leave one out"
        )
    for name, count in given.items():
        at_least(f"model.{name}", count, 1)
        if stages < 2:
            raise UserError(f"model.{name}: {count} needs pipeline_model_parallel_size above 1; leave it out")
        if count % virtual:
            raise UserError(f"model.{name}: must be a multiple of {virtual} (virtual pipeline), got {count}")
    if len(given) == stages and virtual > 1:
        raise UserError(
            f"model.{ends[1]}: with two stages and a virtual pipeline megatron-core takes only one of it and {ends[0]}; leave "
            "it out, and the last stage gets the layers that are left"
        )
    middle, left = stages - len(given), layers + len(extra) - sum(given.values())
    if (left > 0) != (middle > 0) or left < 0 or (middle and left % (middle * virtual)):
        counted = f"{layers} layers"
        counted += "".join(f" - {count} ({name.split('_')[3]} stage)" for name, count in given.items())
        counted += "".join(f" + 1 ({name})" for name in extra)
        mesh = f"{middle} ({'other stages' if given else 'pipeline'})" + (
            f" x {virtual} (virtual)" if virtual > 1 else ""
        )
        fits = [str(n) for n in range(1, layers + 1) if layers % (n * virtual) == 0 and (n > 1 or virtual == 1)]
        would_do = f"pipeline_model_parallel_size could be {' or '.join(fits)}" if fits else "lower the virtual size"
        would_do = "change one of them" if given or extra else would_do
        raise UserError(f"parallel.pipeline_model_parallel_size: {counted} cannot be divided over {mesh}; {would_do}")


def _recompute(run: RunConfig, layers: int) -> None:
    values = run.model.transformer
    kind, count = values.get("recompute_granularity"), values.get("recompute_num_layers")
    method, modules = values.get("recompute_method"), values.get("recompute_modules")
    if kind is None and (method or count or modules):
        raise UserError(
            "model.recompute_granularity: missing beside other recompute settings; set it to full or selective"
        )
    if kind == "full":
        if method is None:
            raise UserError("model.recompute_method: missing; recompute_granularity full needs uniform or block")
        most = max(1, layers // run.parallel.pipeline)
        if count is None or not 1 <= count <= most:
            raise UserError(
                f"model.recompute_num_layers: {show(count)}: full recompute needs 1 to {most} (layers of a stage)"
            )
    if kind == "selective":
        if method is not None or count is not None:
            name = "method" if method is not None else "num_layers"
            raise UserError(
                f"model.recompute_{name}: goes with recompute_granularity full, not selective; leave it out"
            )
        for module in modules or ():
            if module not in RECOMPUTE_MODULES:
                raise UserError(f"model.recompute_modules: {show(module)} is not one of {', '.join(RECOMPUTE_MODULES)}")
            if module == "layernorm" and not machine.transformer_engine():
                raise UserError(
                    "model.recompute_modules: 'layernorm' needs CUDA and Transformer Engine; leave it out here"
                )


def _lengths(run: RunConfig, positions: int, training: bool) -> None:
    if not training:  # calibration rows are cut to the model's positions, and padded
        return
    length, tensor, context = run.data.sequence_length, run.parallel.tensor, run.parallel.context
    at_least("data.sequence_length", length, 1)
    if length > positions:
        raise UserError(
            f"data.sequence_length: {length} is longer than the model's {positions} positions "
            f"(max_position_embeddings in config.json); {positions} or less would do"
        )
    sequence = run.parallel.sequence_parallel
    step = (tensor if sequence else 1) * (2 * context if context > 1 else 1)
    if length % step:
        what = f"sequence parallel over {tensor} (tensor)" if sequence else "context parallel"
        raise UserError(
            f"data.sequence_length: must be a multiple of {step} for {what}, got {length}; "
            f"{max(length // step, 1) * step} would do"
        )
