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
KINDS = {
    "olmo2": ("olmo2", {}),
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama3": (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
}


def make_model(
    kind: str, directory: Path, dtype: torch.dtype = torch.float32, seed: int = 0, max_shard_size: str = "5GB", **sizes
) -> Path:
    """A random model of `kind` with weights large enough that every term matters; returns `directory`."""
    import transformers

    model_type, extra = KINDS[kind]
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **extra, **sizes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype)
    with torch.no_grad():
        for _, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(1 + 0.2 * torch.randn_like(p.float()))
            else:
                p.copy_(0.08 * torch.randn_like(p.float()))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory
