"""What the ranks of the library's tests do: a training loop of megatron-core's own parts, a shield on its model."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

import megatron_ssu as ssu
from megatron_ssu.config.schema import CheckpointSection, ModelSection, RunConfig
from megatron_ssu.data.loader import iterate
from megatron_ssu.engine.experts import ready_router
from megatron_ssu.errors import UserError
from megatron_ssu.train.trainer import forward_step, mean_loss
from tests.dist.work import GLOBAL_BATCH, LENGTH, RandomTokens

MICRO_BATCH = 2
# Settings of the tests' Mixtral.
MIXTRAL: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none",
    "moe_router_dtype": "fp32",
    "moe_token_dispatcher_type": "allgather",
    "expert_tensor_parallel_size": 1,
}


def start(tensor: int = 1, pipeline: int = 1, virtual: int | None = None, expert: int = 1) -> None:
    """megatron's groups, as a loop of somebody else makes them."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=1,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


def build(
    model_dir: str,
    dtype: str = "fp32",
    virtual: int | None = None,
    vocab: int | None = None,
    transformer_engine_keys: bool = False,
    **changes: Any,
) -> list[GPTModel]:
    """This rank's GPTModel chunks with megatron-core's local layer spec; `vocab`: padded; `changes` to the config.

    `transformer_engine_keys`: the norm before experts is stored as by megatron-core's spec of Transformer Engine's layers.
    """
    hf = json.loads((Path(model_dir) / "config.json").read_text())
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    fields: dict[str, Any] = {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "num_query_groups": hf["num_key_value_heads"],
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf["rms_norm_eps"],
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "bf16": dtype == "bf16",
        "params_dtype": torch_dtype,
        "pipeline_dtype": torch_dtype,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": virtual,
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "overlap_p2p_comm": virtual is not None,
        "batch_p2p_comm": False,
        **changes,
    }
    config = TransformerConfig(**fields)
    if config.num_moe_experts:
        ready_router()
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, normalization="RMSNorm", qk_layernorm=config.qk_layernorm
    )
    if transformer_engine_keys:
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    chunks = []
    for stage in range(virtual or 1):
        stages: dict[str, Any] = {"vp_stage": stage if virtual else None}
        assert get_num_layers_to_build(config, **stages) > 0
        chunk = GPTModel(
            config,
            spec,
            vocab_size=vocab or hf["vocab_size"],
            max_sequence_length=hf["max_position_embeddings"],
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, **stages),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, **stages),
            position_embedding_type="rope",
            share_embeddings_and_output_weights=hf.get("tie_word_embeddings", False),
            **stages,
        )
        chunks.append(chunk)
    return chunks


def evaluate(ddp: list[Any], virtual: int | None, iterator: Any, *, forward_only: bool) -> float:
    """A pass of megatron's schedule over one global batch."""
    data = parallel_state.get_data_parallel_world_size()
    reports = get_forward_backward_func()(
        forward_step_func=partial(forward_step, RunConfig(ModelSection(""), CheckpointSection(""))),
        data_iterator=iterator,
        model=ddp if virtual else ddp[0],
        num_microbatches=GLOBAL_BATCH // (MICRO_BATCH * data),
        seq_length=LENGTH,
        micro_batch_size=MICRO_BATCH,
        forward_only=forward_only,
    )
    return mean_loss(reports)[0]


def batches(count: int, consumed: int = 0) -> Any:
    """One iterator of micro-batches, or one per chunk."""
    options: dict[str, Any] = {
        "micro_batch_size": MICRO_BATCH,
        "dp_rank": parallel_state.get_data_parallel_rank(),
        "dp_size": parallel_state.get_data_parallel_world_size(),
        "consumed_samples": consumed,
        "loader_workers": 0,
    }
    found = [iterate(RandomTokens(), **options) for _ in range(count)]
    return found if count > 1 else found[0]


def train(
    model_dir: str,
    mesh: dict[str, Any],
    lrs: list[float],
    shield: str,
    target: str,
    *,
    dtype: str = "fp32",
    ddp: dict[str, Any] | None = None,
    attach: bool = False,
    evaluations: bool = False,
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Losses and gradient norms of a stock loop under a shield; the model is exported to `target`.

    attach: the loop finalizes gradients by itself, and the optimizer is named to the handle. evaluations: the model is
    evaluated after each step and between the gradients and the step; with overlap after every second step, so that forward
    passes follow in which DDP's renewed hooks gather.
    """
    start(**mesh)
    virtual = mesh.get("virtual")
    chunks = build(model_dir, dtype, virtual, **(changes or {}))
    ssu.load_weights(chunks, model_dir)
    config = chunks[0].config
    wrapped: list[Any] = [Float16Module(config, chunk) for chunk in chunks] if dtype == "bf16" else list(chunks)
    handle = ssu.apply(wrapped, shield, model_dir)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True, **(ddp or {}))
    parts = [DistributedDataParallel(config, ddp_config, c, disable_bucketing=i > 0) for i, c in enumerate(wrapped)]
    settings = OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        min_lr=0.0,
        weight_decay=0.1,
        clip_grad=0.5,
        bf16=dtype == "bf16",
        params_dtype=config.params_dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=ddp_config.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(settings, parts)
    if attach:
        handle.attach(optimizer)
    else:
        config.finalize_model_grads_func = finalize_model_grads
    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = [part.no_sync for part in parts] if virtual else parts[0].no_sync
    iterator = batches(len(parts))
    history, watched = [], []
    for step, lr in enumerate(lrs):
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr, 0.1 * group["wd_mult"]  # as megatron's scheduler does
        for part in parts:
            part.zero_grad_buffer()
        optimizer.zero_grad()
        loss = evaluate(parts, virtual, iterator, forward_only=False)
        if attach:
            finalize_model_grads(parts)
        if evaluations and not ddp_config.overlap_param_gather:  # DDP would gather parameters too early, and not again
            watched.append(_watch(parts, virtual))
        _, norm, _ = optimizer.step()
        if evaluations and not (ddp_config.overlap_param_gather and step % 2):
            watched.append(_watch(parts, virtual))
        history.append((loss, float(norm)))
    handle.write(parts)
    handle.export(model_dir, target)
    return {"history": history, "watched": watched}


def _watch(parts: list[Any], virtual: int | None) -> float:
    """Loss on a batch of its own, in evaluation mode; with DDP's overlap as megatron's loop evaluates."""
    overlap = parts[0].ddp_config.overlap_param_gather
    for part in parts:
        part.eval()
        if overlap:
            part.disable_forward_pre_hook(param_sync=True)
    with torch.no_grad():
        loss = evaluate(parts, virtual, batches(len(parts), 10**5), forward_only=True)
    for part in parts:
        part.train()
        if overlap:
            part.enable_forward_pre_hook()
    return loss


def reload(model_dir: str, other_dir: str, shield: str, target: str) -> None:
    """Apply a shield to one model's chunk, load another one's weights into it, and export."""
    start()
    (chunk,) = build(model_dir)
    ssu.load_weights(chunk, model_dir)
    handle = ssu.apply(chunk, shield, model_dir)
    (other,) = build(other_dir)
    ssu.load_weights(other, other_dir)
    chunk.load_state_dict(other.state_dict())
    handle.read()
    handle.updated()
    handle.write()
    handle.export(model_dir, target)


def refused(model_dir: str, other_dir: str, shield: str, tensor: int) -> dict[str, str]:
    """What `apply` and what comes after it say to bad input, by case."""
    found: dict[str, str] = {}

    def told(name: str, work: Any) -> None:
        try:
            work()
        except UserError as error:
            found[name] = str(error)

    told("no mesh", lambda: ssu.apply(torch.nn.Linear(1, 1), shield, model_dir))
    start(tensor)
    (chunk,) = build(model_dir)
    told("no chunks", lambda: ssu.apply([], shield, model_dir))
    told("other module", lambda: ssu.apply(torch.nn.Linear(1, 1), shield, model_dir))
    told("other model", lambda: ssu.apply(chunk, shield, other_dir))
    told("no config", lambda: ssu.apply(chunk, shield, 3))
    told("bias", lambda: ssu.apply(build(model_dir, add_bias_linear=True), shield, model_dir))
    told("heads", lambda: ssu.apply(build(model_dir, num_query_groups=8), shield, model_dir))
    (deferred,) = build(model_dir)
    deferred.config.defer_embedding_wgrad_compute = True
    told("deferred", lambda: ssu.apply(deferred, shield, model_dir))
    hf = json.loads((Path(model_dir) / "config.json").read_text())
    told("width", lambda: ssu.apply(chunk, shield, {**hf, "intermediate_size": 64}))
    told("family", lambda: ssu.apply(chunk, shield, {**hf, "model_type": "gpt2"}))
    opened = ssu.load_shield(shield)
    few = json.loads((Path(other_dir) / "config.json").read_text())
    told("shield's shapes", lambda: ssu.apply(build(other_dir), opened, few))
    (odd,) = build(model_dir)
    odd.decoder.layers[0].mlp.linear_fc2.weight = torch.nn.Parameter(torch.zeros(64, 5))
    told("shape", lambda: ssu.apply(odd, shield, model_dir))
    (half,) = build(model_dir)
    told("dtype", lambda: ssu.apply(half.bfloat16(), shield, model_dir))
    config = DistributedDataParallelConfig(use_distributed_optimizer=True)
    wrapped = DistributedDataParallel(chunk.config, config, chunk)
    told("DDP", lambda: ssu.apply(wrapped, shield, model_dir))
    told("in DDP", lambda: ssu.apply(chunk, shield, model_dir))
    told("weights", lambda: ssu.load_weights(wrapped, model_dir))
    (blind,) = build(model_dir)
    ssu.apply(blind, shield, hf)
    part = DistributedDataParallel(blind.config, config, blind)
    told("no finalize", lambda: evaluate([part], None, batches(1), forward_only=False))
    return found


def score(model_dir: str, tensor: int, calibration: str, names: list[str]) -> list[dict[str, Any]]:
    """Scores of the model's directory and of chunks on a mesh that is there; both must leave it as it is."""
    start(tensor)
    group = parallel_state.get_tensor_model_parallel_group()
    (chunk,) = build(model_dir)
    ssu.load_weights(chunk, model_dir)
    chunk.config.finalize_model_grads_func = finalize_model_grads
    chunk.eval()
    options: dict[str, Any] = {"scores": names, "calibration": calibration, "samples": 8, "sequence_length": 32}
    found = [ssu.score(model_dir, **options), ssu.score(model_dir, chunks=chunk, **options)]
    assert parallel_state.get_tensor_model_parallel_group() is group
    assert chunk.config.finalize_model_grads_func is finalize_model_grads
    assert not any(module.training for module in chunk.modules())
    assert all(p.requires_grad and p.grad is None for p in chunk.parameters())
    return [scores.tensors for scores in found]


def score_experts(model_dir: str, calibration: str) -> tuple[dict[str, Any], str]:
    """Scores of the model's directory on two tensor- and expert-parallel ranks, and what chunks on them are refused with."""
    start(2, expert=2)
    options: dict[str, Any] = {"scores": ["wanda"], "calibration": calibration, "samples": 8, "sequence_length": 32}
    found = ssu.score(model_dir, **options)
    (chunk,) = build(model_dir, **MIXTRAL)
    try:
        ssu.score(model_dir, chunks=chunk, **options)
    except UserError as error:
        return found.tensors, str(error)
    return found.tensors, ""
