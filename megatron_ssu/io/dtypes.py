"""Floating-point dtypes of weights by their names in run files, torch and safetensors. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# Name in run files -> in torch and in a model's config.json.
TORCH_NAMES: Mapping[str, str] = MappingProxyType({"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"})
# Name in safetensors files -> in torch.
STORED_NAMES: Mapping[str, str] = MappingProxyType({"F32": "float32", "BF16": "bfloat16", "F16": "float16"})
