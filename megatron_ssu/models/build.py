"""From a run file and a Hugging Face config to megatron's TransformerConfig and GPTModel chunks."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_ssu.config.schema import RunConfig
from megatron_ssu.config.sources import counts_tokens, isolates
from megatron_ssu.engine.device import has_cuda, local_device
from megatron_ssu.engine.experts import mark_experts, ready_router
from megatron_ssu.engine.mesh import Mesh
from megatron_ssu.errors import UserError
from megatron_ssu.io.dtypes import TORCH_NAMES
from megatron_ssu.models.family import Dims, Family, padded_vocab
from megatron_ssu.models.hf_config import normalised
from megatron_ssu.models.layers import cap_logits, mask_padded_vocabulary, scale_embeddings
from megatron_ssu.models.rope import RopeTables, needs_tables, ropes

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, TORCH_NAMES[name]) for name in ("bf16", "fp32")}


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's layers are used: where CUDA is and it can be imported."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return has_cuda() and HAVE_TE


def _keep(tensor: torch.Tensor) -> torch.Tensor:
    """Weight initialisation: none, the checkpoint fills the weights; megatron still marks them as parallel."""
    return tensor


def fused_settings(run: RunConfig, *, engine: bool) -> dict[str, bool]:
    """megatron's fused kernels that compute the same, for a model on CUDA; megatron's own defaults are the unfused ones.

    `engine`: Transformer Engine is there, which has rope's. The fused cross entropy rounds its gradient to bf16.
    """
    return {
        "bias_activation_fusion": not run.model.transformer.get("use_te_activation_func"),
        "bias_dropout_fusion": True,
        "apply_rope_fusion": engine,
        "cross_entropy_loss_fusion": run.precision.dtype == "bf16",
    }


def transformer_config(run: RunConfig, family: Family, hf: dict[str, Any], dims: Dims) -> TransformerConfig:
    """megatron's settings for this model, built once.

    Raises:
        UserError: megatron-core refuses the combination.
    """
    dtype = DTYPES[run.precision.dtype]
    fields: dict[str, Any] = {
        "num_layers": dims.layers,
        "hidden_size": dims.hidden,
        "num_attention_heads": dims.heads,
        "num_query_groups": dims.groups,
        "ffn_hidden_size": dims.ffn,
        "kv_channels": dims.head,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method": _keep,
        "output_layer_init_method": _keep,
        "embedding_init_method": _keep,
        "bf16": dtype is torch.bfloat16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "calculate_per_token_loss": counts_tokens(run),
        **family.settings(normalised(hf)),
    }
    if dims.experts is not None:
        # Of megatron's exchanges of tokens the one that has all ranks gather all of them runs without CUDA too.
        fields["moe_token_dispatcher_type"] = "alltoall" if has_cuda() else "allgather"
    if has_cuda():
        fields |= fused_settings(run, engine=has_transformer_engine())
    else:
        fields |= {
            "masked_softmax_fusion": False,
            "bias_activation_fusion": False,
            "bias_dropout_fusion": False,
            "gradient_accumulation_fusion": False,
        }
        if run.parallel.virtual_pipeline:
            # On gloo the batched exchange of the interleaved schedule delivers wrong tensors without an error.
            fields |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    if fields["activation_func"] is not torch.nn.functional.silu:
        fields["bias_activation_fusion"] = False  # megatron fuses silu and the exact GELU
    if isolates(run) or any(layer.window for layer in dims.attention):
        fields["masked_softmax_fusion"] = False  # its causal kernel reads no mask
    fields |= run.parallel.transformer | run.precision.transformer | run.model.transformer
    try:
        return TransformerConfig(**fields)
    except (AssertionError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split()) or "settings that do not go together"
        raise UserError(f"model, parallel or precision: megatron-core refuses: {reason}") from error


def build_chunks(
    run: RunConfig, family: Family, hf: dict[str, Any], dims: Dims, config: TransformerConfig, mesh: Mesh
) -> list[GPTModel]:
    """This rank's model chunks, one or one per virtual stage, with unset weights on this rank's device.

    Raises:
        UserError: FP8 or FP4 without Transformer Engine; megatron-core would run it in bf16 without a word.
    """
    for name in ("fp8", "fp4"):  # sessions opened without `check_run`, as benchmarks do, have not asked
        if getattr(config, name) and not has_transformer_engine():
            raise UserError(
                f"precision.{name}: {getattr(config, name)!r} needs CUDA and a Transformer Engine that megatron-core can "
                "import; leave it out here"
            )
    from megatron_ssu.models.specs import layer_specs

    found, scales = ropes(hf, run.model.path), family.scales(normalised(hf))
    specs = layer_specs(family.layer_spec(dims, has_transformer_engine()), dims, found, scales)
    tables = needs_tables(dims, found)
    norm = _final_norm()
    if dims.experts is not None:
        ready_router()
    chunks = []
    for stage in range(mesh.chunks):
        vp_stage = stage if mesh.virtual else None
        first = get_transformer_layer_offset(config, vp_stage, mesh.pipeline_rank)
        layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=mesh.pipeline_rank)
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(
                layer_specs=specs[first : first + layers], layer_norm=norm
            ),
            vocab_size=padded_vocab(dims.vocab, run.model.make_vocab_size_divisible_by),
            max_sequence_length=dims.positions,
            pre_process=mesh.first_stage and stage == 0,
            post_process=mesh.last_stage and stage == mesh.chunks - 1,
            share_embeddings_and_output_weights=dims.tied,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        if tables:
            chunk.rotary_pos_emb = RopeTables(chunk.rotary_pos_emb, list(found.values()))
        else:
            used = next((layer.rope for layer in dims.attention if layer.rope is not None), next(iter(found)))
            rope = found[used]  # all layers have the same
            chunk.rotary_pos_emb.inv_freq = rope.frequencies.to(local_device())
        mark_experts(chunk, mesh)
        if chunk.pre_process and scales.embedding is not None:
            scale_embeddings(chunk.embedding.word_embeddings, scales.embedding)
        if chunk.post_process:
            if scales.logit_cap is not None:
                cap_logits(chunk.output_layer, scales.logit_cap)
            mask_padded_vocabulary(chunk.output_layer, dims.vocab)
        chunks.append(chunk.to(local_device()))
    return chunks


def _final_norm() -> type:
    from megatron_ssu.models.specs import backend

    return backend(has_transformer_engine()).norm
