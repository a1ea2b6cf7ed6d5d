"""What a mesh and a run file can ask of a family, beyond what sizes alone decide."""

from __future__ import annotations

from megatron_ssu.config.schema import RunConfig
from megatron_ssu.config.sources import isolates
from megatron_ssu.errors import UserError
from megatron_ssu.models.family import Dims, Family, Scales

TENSOR, CONTEXT = "parallel.tensor_model_parallel_size", "parallel.context_parallel_size"
EXPERT = "parallel.expert_model_parallel_size"


def check_limits(run: RunConfig, family: Family, dims: Dims, scales: Scales, *, transformer_engine: bool) -> None:
    """Raises UserError, naming the key, for what the model's attention is not computed with."""
    check_heads(run.parallel.tensor, family, dims, TENSOR)
    _check_experts(run, dims)
    if scales.attention_cap is not None and run.parallel.context > 1:
        raise UserError(
            f"{CONTEXT}: {run.parallel.context} does not go with attn_logit_softcapping {scales.attention_cap} in "
            "config.json, which Transformer Engine's attention lacks; set it to 1"
        )
    if scales.attention_cap is not None and transformer_engine and isolates(run):
        raise UserError(
            f"data.cross_document_attention: false does not go with attn_logit_softcapping {scales.attention_cap} in "
            "config.json on a GPU: isolated documents need Transformer Engine's attention, which has no cap; set it to true"
        )
    exchange = run.parallel.transformer.get("cp_comm_type") or "p2p"
    if run.parallel.context > 1 and exchange == "p2p" and any(layer.window for layer in dims.attention):
        raise UserError(
            "parallel.cp_comm_type: must be a2a or all_gather for a model with sliding windows (sliding_window in "
            f"config.json), got {exchange}"
        )


def _check_experts(run: RunConfig, dims: Dims) -> None:
    expert, tensor = run.parallel.expert, run.parallel.tensor
    if dims.experts is None:
        if expert > 1:
            raise UserError(f"{EXPERT}: must be 1 for a model without experts, got {expert}")
        if "moe_token_dispatcher_type" in run.model.transformer:
            raise UserError("model.moe_token_dispatcher_type: the model has no experts; leave it out")
        return
    if dims.experts.count % expert:
        raise UserError(f"{EXPERT}: must divide the {dims.experts.count} experts of a layer, got {expert}")
    if tensor > 1 and not run.parallel.sequence_parallel:
        raise UserError(
            f"parallel.sequence_parallel: must be true for a model with experts on {tensor} tensor-parallel ranks, which "
            "divide its tokens; set it"
        )
    for key, value in run.precision.transformer.items():
        if key in ("fp8", "fp4") and value:
            raise UserError(f"precision.{key}: is not supported for a model with experts; leave it out")


def check_method(name: str, dims: Dims, *, experts: bool) -> None:
    """Raises UserError for a method that does not go with the model; `experts`: whether it goes with layers of them."""
    if dims.experts is not None and not experts:
        raise UserError(f"method.name: {name} is not supported on a model with experts; choose another method")


def check_adapters(run: RunConfig, family: Family, dims: Dims) -> None:
    """Raises UserError for models and meshes on which adapters have no place of their own."""
    if any("[" in tensor for entry in family.layer for tensor in entry.tensors):
        raise UserError(
            f"method.name: adapters are not supported on a {family.name}, whose checkpoints hold q, k and v in one tensor: "
            "a PEFT directory could not name them; choose another method"
        )
    if run.parallel.tensor > dims.groups:
        raise UserError(
            f"{TENSOR}: must be at most {dims.groups} (num_key_value_heads in config.json) with adapters, got "
            f"{run.parallel.tensor}"
        )


def check_heads(tensor: int, family: Family, dims: Dims, key: str) -> None:
    """Raises UserError where `tensor` tensor-parallel ranks cannot share the heads of q, k and v; `key` is what set them."""
    if dims.heads % tensor == 0 and dims.groups % tensor == 0:
        return
    if dims.heads % tensor or tensor % dims.groups:
        raise UserError(
            f"{key}: {tensor} ranks must divide the {dims.heads} attention heads, and divide the {dims.groups} key/value heads "
            "or be a multiple of them"
        )
    if any(kind == "k_norm" for entry in family.layer for kind in entry.kinds):
        raise UserError(
            f"{key}: must divide the {dims.groups} key/value heads of a {family.name}, whose norms span all of them, got "
            f"{tensor}"
        )
