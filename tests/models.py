"""Small random models as Hugging Face directories."""

from __future__ import annotations

from pathlib import Path

import torch

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# What each family does beside Llama; windows are less than half of a test's sequence, layers one more than their pattern.
FAMILIES = {
    "smollm2": ("llama", {"tie_word_embeddings": True, "head_dim": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": 8, "head_dim": 16}),
    "nemo": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "smollm3": ("smollm3", {"tie_word_embeddings": True, "no_rope_layers": [1, 0, 1, 0], "use_sliding_window": False}),
    "olmo3": (
        "olmo3",
        {
            "num_hidden_layers": 8,
            "sliding_window": 8,
            "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
                "full_attention": {"rope_theta": 5e5, **YARN},
            },
        },
    ),
    "phi3": ("phi3", {"sliding_window": 8}),
    "phi3-longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.2, 1.5],
                "long_factor": [1.5, 3.0, 4.0],
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.5,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 8,
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
    ),
}
# Mixtures of experts; few of them, since where two are equally good for a token within rounding, rounding decides.
EXPERTS = {
    "qwen3-moe": (
        "qwen3_moe",
        {
            "head_dim": 16,
            "moe_intermediate_size": 40,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
    "qwen3-moe-mixed": (
        "qwen3_moe",
        {
            "head_dim": 16,
            "moe_intermediate_size": 40,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
            "decoder_sparse_step": 2,
            "num_hidden_layers": 8,
            "mlp_only_layers": [3],
        },
    ),
    "mixtral": (
        "mixtral",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False}),
}
KINDS = {
    "olmo2": ("olmo2", {}),
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama3": (
        "llama",
        {"rope_scaling": LLAMA3},
    ),
}


def by_file(config, tensors):
    """Parameters of transformers' model by their names in files; experts, which it stacks, one by one, as views."""
    found = {}
    mixtral = config.model_type == "mixtral"
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    for name, tensor in tensors.items():
        name = name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name
        block, _, stacked = name.rpartition(".")
        if not block.endswith("experts"):
            found[name] = tensor
        elif stacked == "down_proj":
            found |= {f"{block}.{k}.{names[2]}.weight": part for k, part in enumerate(tensor)}
        else:
            for k, part in enumerate(tensor):
                found |= {f"{block}.{k}.{n}.weight": half for n, half in zip(names[:2], part.chunk(2), strict=True)}
    return found


def make_model(
    kind: str, directory: Path, dtype: torch.dtype = torch.float32, seed: int = 0, max_shard_size: str = "5GB", **sizes
) -> Path:
    """A random model of `kind` with weights large enough that every term matters; returns `directory`."""
    import transformers

    model_type, extra = {**KINDS, **FAMILIES, **EXPERTS}[kind]
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **extra, **sizes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                centre = 0 if name.endswith("bias") or model_type.startswith("gemma") else 1
                p.copy_(centre + 0.2 * torch.randn_like(p.float()))
            else:
                p.copy_(0.08 * torch.randn_like(p.float()))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory
