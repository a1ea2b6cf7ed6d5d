"""From a run file and a Hugging Face config to megatron's TransformerConfig and GPTModel chunks."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ssu.config.schema import RunConfig
from megatron_ssu.config.sources import counts_tokens, isolates
from megatron_ssu.engine.device import has_cuda, local_device
from megatron_ssu.engine.mesh import Mesh
from megatron_ssu.errors import UserError
from megatron_ssu.io.dtypes import TORCH_NAMES
from megatron_ssu.models.family import Dims, Family, padded_vocab
from megatron_ssu.models.layers import mask_padded_vocabulary

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
        **family.settings(hf, dims),
    }
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
    if isolates(run):
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
    frequencies = rope_frequencies(hf, run.model.path)
    layer_spec = family.layer_spec(dims, has_transformer_engine())
    norm = _final_norm()
    chunks = []
    for stage in range(mesh.chunks):
        vp_stage = stage if mesh.virtual else None
        layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=mesh.pipeline_rank)
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(layer_specs=[layer_spec] * layers, layer_norm=norm),
            vocab_size=padded_vocab(dims.vocab, run.model.make_vocab_size_divisible_by),
            max_sequence_length=dims.positions,
            pre_process=mesh.first_stage and stage == 0,
            post_process=mesh.last_stage and stage == mesh.chunks - 1,
            share_embeddings_and_output_weights=dims.tied,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        chunk.rotary_pos_emb.inv_freq = frequencies.to(local_device())
        if chunk.post_process:
            mask_padded_vocabulary(chunk.output_layer, dims.vocab)
        chunks.append(chunk.to(local_device()))
    return chunks


def _final_norm() -> type:
    from megatron_ssu.models.specs import backend

    return backend(has_transformer_engine()).norm


def rope_frequencies(hf: dict[str, Any], path: str) -> torch.Tensor:
    """Inverse frequencies [head / 2] fp32 as transformers computes them (default, linear, llama3).

    Raises:
        UserError: settings that are incomplete or not numbers; a rope that changes with the sequence or scales attention.
    """
    file = f"{path}/config.json"
    kind = _check_rope(hf, file)
    try:
        frequencies, attention_factor = _frequencies(hf, kind)
    except Exception as error:  # transformers raises many kinds for settings that it does not expect
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{file}: the rope settings cannot be used ({reason}); copy the file again") from error
    if attention_factor != 1.0:
        raise UserError(f"{file}: rope scales attention by {attention_factor}; that is not supported")
    if not bool(torch.isfinite(frequencies).all()):
        raise UserError(f"{file}: the rope settings give frequencies that are not finite; copy the file again")
    return frequencies


def _check_rope(hf: dict[str, Any], file: str) -> str:
    """The rope's type. Raises UserError for another than is supported, and for numbers that are none."""
    sections = {name: hf.get(name) or {} for name in ("rope_parameters", "rope_scaling")}
    kind = "default"
    for name, settings in sections.items():
        if not isinstance(settings, dict):
            raise UserError(f"{file}: {name} must be an object, got {settings!r}; copy the file again")
        kind = settings.get("rope_type") or settings.get("type") or kind
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"{file}: rope type {kind!r} is not supported; supported are default, linear, llama3")
    for name, settings in sections.items():
        for key, value in settings.items():
            if key not in ("rope_type", "type"):
                _positive(value, f"{name}.{key}", file)
    _positive(hf.get("rope_theta", 10000.0), "rope_theta", file)
    return kind


def _positive(value: Any, key: str, file: str) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
        raise UserError(f"{file}: {key} must be a number above 0, got {value!r}; copy the file again")


def _frequencies(hf: dict[str, Any], kind: str) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [head / 2] fp32, and the factor that attention is scaled by."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.for_model(**hf)
    if kind != "default":
        frequencies, attention_factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        return frequencies.float(), attention_factor
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    head = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    base = scaling.get("rope_theta") or getattr(config, "rope_theta", 10000.0)
    return 1.0 / (base ** (torch.arange(0, head, 2, dtype=torch.int64).to(torch.float32) / head)), 1.0
