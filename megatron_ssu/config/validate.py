"""Everything about a run that can be checked without weights: mesh, number formats, model and training settings.

Pure functions of the run file, the world size and the model's config.json; no process group, no CUDA context. Each
raises UserError with the key, the value and what would do.
"""
# ruff: noqa: SIM905 - names read better as one line of words

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_ssu.config.coerce import field_default, show
from megatron_ssu.config.schema import RunConfig
from megatron_ssu.config.validate_train import (
    at_least,
    validate_checkpoint,
    validate_train,
)
from megatron_ssu.errors import UserError

_OTHER_MODEL = "would make it another model than config.json of model.path"
_INFERENCE = "is for inference; this trains"
_ADAM = "megatron-core's distributed optimizer takes adam alone"
_FSDP = "fully sharded data parallelism is not supported; the distributed optimizer already shards the optimizer states"

# megatron settings that nothing here carries, as patterns of dotted keys; their defaults pass.
UNSUPPORTED: tuple[tuple[str, str], ...] = (
    *((f"model.{n}", "mixture of experts is not supported") for n in ("num_moe_experts", "moe_*")),
    *((f"parallel.{n}", "mixture of experts is not supported") for n in ("expert_*", "moe_*", "*moe_expert*", "ep_*")),
    *((f"{s}.mtp_*", "multi-token prediction is not supported") for s in ("model", "parallel")),
    *(
        (f"model.{name}", _OTHER_MODEL)
        for name in (
            "multi_latent_attention mamba_* linear_* dsa_* experimental_attention_variant attention_output_gate "
            "heterogeneous_block_specs hetereogenous_dist_checkpoint is_hybrid_model window_* "
            "no_rope_freq mrope_section softmax_type softmax_scale qk_l2_norm qk_clip* activation_func_clamp_value "
            "glu_linear_offset apply_residual_connection_post_layernorm apply_query_key_layer_scaling"
        ).split()
    ),
    *((f"model.{name}", _INFERENCE) for name in ("inference_*", "flash_decode", "use_inference_*", "mlp_chunks_*")),
    *((f"model.{name}", "is not supported") for name in ("*kitchen*", "quant_recipe", "test_mode")),
    ("model.init_model_with_meta_device", _FSDP),
    ("model.calculate_per_token_loss", "the loss is a mean over the tokens of a micro-batch"),
    ("model.pipeline_model_parallel_layout", "cannot be checked; use num_layers_in_first/last_pipeline_stage"),
    ("parallel.hybrid_context_parallel", "is not supported"),
    ("parallel.tp_comm_overlap", "nothing here sets up the communication buffers that it needs"),
    ("precision.fp8_wgrad", "Transformer Engine 2 has no such choice and would ignore it"),
    *((f"parallel.ddp.{n}", _FSDP) for n in ("*fsdp*", "*sharding_strategy")),
    ("parallel.ddp.num_distributed_optimizer_instances", "only one is supported"),
    *((f"train.optimizer.{name}", _ADAM) for name in ("optimizer", "muon_*", "sgd_*")),
    ("train.optimizer.log_num_zeros_in_grad", "is not logged; metrics have the gradient norm and the update norms"),
    *(
        (f"train.optimizer.{name}", "losses are scaled for fp16 only, which precision.dtype does not offer")
        for name in ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")
    ),
)
_GRAPH = "what trains is written into the weights before a layer runs, which a recorded graph would not repeat"
_QUANTIZED = "elements cannot be written into a weight that is kept in FP8 or FP4"
# Refused only with a shield.
UNSHIELDED: dict[str, str] = {
    "model.enable_cuda_graph": _GRAPH,
    "model.external_cuda_graph": _GRAPH,
    "model.cuda_graph_impl": _GRAPH,
    "parallel.defer_embedding_wgrad_compute": "a shielded head adds its weight gradient in its own backward pass",
    "parallel.ddp.fp8_param_gather": _QUANTIZED,
    "precision.fp8_param": _QUANTIZED,
    "precision.fp4_param": _QUANTIZED,
}
NEEDS_CUDA: tuple[str, ...] = (
    "model.masked_softmax_fusion",
    "model.apply_rope_fusion",
    "model.persist_layer_norm",
    "model.enable_cuda_graph",
    "model.external_cuda_graph",
    "model.cuda_graph_impl",
    "model.use_te_*",
    "model.fine_grained_activation_offloading",
    "parallel.gradient_accumulation_fusion",
    "parallel.cpu_offloading",
    "parallel.use_te_rng_tracker",
    "parallel.ddp.nccl_ub",
    "parallel.ddp.average_in_collective",
    "train.optimizer.use_precision_aware_optimizer",
    "train.optimizer.optimizer_cpu_offload",
)
RECOMPUTE_MODULES = ("core_attn", "mlp", "layernorm")


def _cuda() -> bool:
    return torch.cuda.is_available()


def _transformer_engine() -> bool:
    """Whether megatron-core will use Transformer Engine; an installed one that it cannot import does not count."""
    if not _cuda():
        return False
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE


def _flash_attention() -> bool:
    """Whether a flash-attention that Transformer Engine looks for is installed."""
    for name in ("flash-attn", "flash-attn-3", "flash-attn-4"):
        with suppress(metadata.PackageNotFoundError):
            metadata.version(name)
            return True
    return False


def validate_run(
    run: RunConfig,
    world_size: int,
    hf: dict[str, Any],
    *,
    training: bool = True,
    writing: bool = True,
    shields: bool = True,
) -> None:
    """All checks but those of the method and its shield.

    Without `training` those that `score` needs (mesh, precision, model, where it writes), without `writing` those that `export`
    does (mesh, precision, model). `shields`: whether weights may be frozen in part.
    """
    dp = validate_mesh(run, world_size, shields=shields)
    validate_precision(run)
    validate_model(run, hf, training=training)
    if training:
        validate_train(run, dp)
    elif writing:
        validate_checkpoint(run)


def validate_mesh(run: RunConfig, world_size: int, *, shields: bool = True) -> int:
    """Check the mesh against `world_size` ranks; returns the number of data-parallel ranks."""
    parallel = run.parallel
    tensor, pipeline, context = parallel.tensor, parallel.pipeline, parallel.context
    for name, size in (("tensor_model", tensor), ("pipeline_model", pipeline), ("context", context)):
        at_least(f"parallel.{name}_parallel_size", size, 1)
    _refuse_unsupported(run, shields)
    if not parallel.timeout_minutes > 0:
        raise UserError(f"parallel.timeout_minutes: {parallel.timeout_minutes} must be above 0; 30 is usual")
    model = tensor * pipeline * context
    if world_size % model:
        raise UserError(
            f"parallel: {tensor} (tensor) x {pipeline} (pipeline) x {context} (context) does not divide {world_size} "
            f"(world size); start a multiple of {model} ranks or choose sizes whose product divides {world_size}"
        )
    if parallel.sequence_parallel and tensor == 1:
        raise UserError(
            "parallel.sequence_parallel: true needs tensor_model_parallel_size above 1; set it to false, or raise "
            "tensor_model_parallel_size"
        )
    _virtual_pipeline(run)
    if context > 1 and not _transformer_engine():
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
    if (not _cuda() or pipeline == 2) and (values.get("batch_p2p_comm") or values.get("overlap_p2p_comm") is False):
        raise UserError(
            f"parallel.overlap_p2p_comm: {virtual} virtual stages on {pipeline} (pipeline) need overlap_p2p_comm: true "
            f"and batch_p2p_comm: false here; leave both out"
        )


def _settings(run: RunConfig) -> Iterator[tuple[str, Any]]:
    """Every megatron field of the run file that differs from megatron's default: (dotted key, value)."""
    for section, holder, attribute in (
        ("model", run.model, "transformer"),
        ("parallel", run.parallel, "transformer"),
        ("parallel.ddp", run.parallel, "ddp"),
        ("precision", run.precision, "transformer"),
        ("train.optimizer", run.train, "optimizer"),
    ):
        field = next(f for f in dataclasses.fields(holder) if f.name == attribute)
        defaults = {f.name: field_default(f) for f in dataclasses.fields(field.metadata["megatron"].load())}
        for name, value in getattr(holder, attribute).items():
            if value != defaults.get(name, dataclasses.MISSING):
                yield f"{section}.{name}", value


def _refuse_unsupported(run: RunConfig, shields: bool) -> None:
    for key, value in _settings(run):
        if key == "parallel.expert_tensor_parallel_size" and value == 1:
            continue
        shown = show(value)
        for pattern, reason in UNSUPPORTED:
            if fnmatch(key, pattern):
                raise UserError(f"{key}: {shown}: {reason}; leave it out")
        if shields and key in UNSHIELDED:
            raise UserError(
                f"{key}: {shown} does not go with method {run.method.name}: {UNSHIELDED[key]}; leave it out, or set "
                "method.name: none"
            )
        if not _cuda() and any(fnmatch(key, pattern) for pattern in NEEDS_CUDA):
            raise UserError(f"{key}: {shown} needs CUDA, which is not here; leave it out")
        if key == "model.attention_backend" and value.name in ("flash", "fused") and not _transformer_engine():
            raise UserError(f"{key}: {value.name} needs CUDA and Transformer Engine, which are not here; leave it out")
        if key == "model.attention_backend" and value.name == "flash" and not _flash_attention():
            raise UserError(
                f"{key}: flash needs the flash-attn package, which is not installed here; install it, or leave it out: "
                "Transformer Engine then takes cuDNN's fused attention"
            )


def validate_precision(run: RunConfig) -> None:
    """Check that the number formats asked for are to be had here."""
    values = run.precision.transformer
    for name in ("fp8", "fp4"):
        if values.get(name) is not None:
            if not _transformer_engine():
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


def validate_model(run: RunConfig, hf: dict[str, Any], *, training: bool = True) -> None:
    """Check the model of config.json (`hf`) against the mesh and the sequence length."""
    sizes = _sizes(run, hf)
    _tensor_parallel(run, sizes)
    _layers(run, sizes["num_hidden_layers"])
    _recompute(run, sizes["num_hidden_layers"])
    _lengths(run, sizes["max_position_embeddings"], training)
    if training:
        _fp8_shapes(run, sizes)


def _sizes(run: RunConfig, hf: dict[str, Any]) -> dict[str, int]:
    """The sizes in config.json; all must be whole numbers above 0."""
    names = "num_hidden_layers hidden_size num_attention_heads num_key_value_heads intermediate_size vocab_size"
    sizes = {}
    for name in (*names.split(), "max_position_embeddings"):
        value = hf.get(name)
        if name == "num_key_value_heads" and value is None:
            value = hf.get("num_attention_heads")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            shown = "missing" if name not in hf else f"{show(value)}, not a whole number above 0"
            raise UserError(f"{Path(run.model.path) / 'config.json'}: {name} is {shown}; copy the file again")
        sizes[name] = value
    for large, small in (("num_attention_heads", "num_key_value_heads"), ("hidden_size", "num_attention_heads")):
        if sizes[large] % sizes[small] and not (large == "hidden_size" and hf.get("head_dim")):
            raise UserError(
                f"{Path(run.model.path) / 'config.json'}: {small} {sizes[small]} does not divide {large} {sizes[large]}"
            )
    return sizes


def _tensor_parallel(run: RunConfig, sizes: dict[str, int]) -> None:
    tensor, padding = run.parallel.tensor, run.model.make_vocab_size_divisible_by
    split = ("num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size")
    common = math.gcd(*(sizes[name] for name in split))
    for name in split:
        if sizes[name] % tensor:
            would_do = ", ".join(str(n) for n in range(1, min(common, 128) + 1) if common % n == 0)
            raise UserError(
                f"parallel.tensor_model_parallel_size: {tensor} does not divide {sizes[name]} ({name} in config.json); "
                f"choose one of {would_do}"
            )
    at_least("model.make_vocab_size_divisible_by", padding, 1)
    if padding % tensor:
        raise UserError(
            f"model.make_vocab_size_divisible_by: {padding} is no multiple of {tensor} (tensor), so the padded "
            f"vocabulary would not split evenly; {math.lcm(padding, tensor)} would do"
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
            raise UserError(f"model.{name}: {count} is no multiple of {virtual} (virtual pipeline); choose one that is")
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
        raise UserError(f"parallel.pipeline_model_parallel_size: {counted} cannot be shared out to {mesh}; {would_do}")


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
            if module == "layernorm" and not _transformer_engine():
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
            f"data.sequence_length: {length} is no multiple of {step}, which {what} needs; "
            f"{max(length // step, 1) * step} would do"
        )


def _fp8_shapes(run: RunConfig, sizes: dict[str, int]) -> None:
    """FP8 products take multiples of 16 alone."""
    if not run.precision.transformer.get("fp8"):
        return
    tensor, context = run.parallel.tensor, run.parallel.context
    for name in ("hidden_size", "intermediate_size"):
        if sizes[name] // tensor % 16:
            raise UserError(
                f"precision.fp8: {sizes[name]} ({name} in config.json) over {tensor} (tensor) is no multiple of 16, which FP8 "
                "needs; lower parallel.tensor_model_parallel_size, or leave precision.fp8 out"
            )
    parts = context * (tensor if run.parallel.sequence_parallel else 1)
    tokens = run.data.sequence_length * run.train.micro_batch_size // parts
    if tokens % 16:
        raise UserError(
            f"precision.fp8: {tokens} tokens a rank and micro-batch are no multiple of 16, which FP8 needs; change "
            "data.sequence_length or train.micro_batch_size"
        )
