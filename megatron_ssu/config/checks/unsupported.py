"""Settings of megatron-core's that are refused: everywhere, under a shield, or without CUDA."""
# ruff: noqa: SIM905 - names read better as one line of words

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

from megatron_ssu.config.checks import machine
from megatron_ssu.config.coerce import field_default, show
from megatron_ssu.config.schema import RunConfig
from megatron_ssu.errors import UserError

_OTHER_MODEL = "would make it another model than config.json of model.path"
_INFERENCE = "is for inference; this trains"
_ADAM = "megatron-core's distributed optimizer takes adam alone"
_FSDP = "fully sharded data parallelism is not supported; the distributed optimizer already shards the optimizer states"

# megatron settings that nothing here carries, as patterns of dotted keys; their defaults pass.
UNSUPPORTED: tuple[tuple[str, str], ...] = (
    *((f"model.{n}", "config.json decides it") for n in ("num_moe_experts", "moe_ffn_hidden_size", "moe_layer_freq")),
    ("model.moe_grouped_gemm", "experts are shielded one by one, each as a module of its own"),
    ("model.moe_*", "is not supported"),
    ("parallel.expert_tensor_parallel_size", "an expert is never split over ranks"),
    *((f"parallel.{n}", "is not supported") for n in ("moe_*", "*moe_expert*", "ep_*")),
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
    ("model.calculate_per_token_loss", "the data decides it: see data.loss_on and data.packing"),
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


def refuse_unsupported(run: RunConfig, shields: bool) -> None:
    for key, value in _settings(run):
        shown = show(value)
        if key == "model.moe_token_dispatcher_type":
            _check_dispatcher(value)
            continue
        if key == "parallel.expert_tensor_parallel_size" and value == 1:
            continue
        for pattern, reason in UNSUPPORTED:
            if fnmatch(key, pattern):
                raise UserError(f"{key}: {shown}: {reason}; leave it out")
        if shields and key in UNSHIELDED:
            raise UserError(
                f"{key}: {shown} does not go with method {run.method.name}: {UNSHIELDED[key]}; leave it out, or set "
                "method.name: none"
            )
        if not machine.cuda() and any(fnmatch(key, pattern) for pattern in NEEDS_CUDA):
            raise UserError(f"{key}: {shown} needs CUDA, which is not here; leave it out")
        if key == "model.attention_backend" and value.name in ("flash", "fused") and not machine.transformer_engine():
            raise UserError(f"{key}: {value.name} needs CUDA and Transformer Engine, which are not here; leave it out")
        if key == "model.attention_backend" and value.name == "flash" and not machine.flash_attention():
            raise UserError(
                f"{key}: flash needs the flash-attn package, which is not installed here; install it, or leave it out: "
                "Transformer Engine then takes cuDNN's fused attention"
            )


def _check_dispatcher(kind: str) -> None:
    key, allowed = "model.moe_token_dispatcher_type", ("allgather", "alltoall") if machine.cuda() else ("allgather",)
    if kind not in allowed:
        needs = " without CUDA" if kind == "alltoall" else ""
        raise UserError(f"{key}: must be {' or '.join(allowed)}{needs}, got {kind}")


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
