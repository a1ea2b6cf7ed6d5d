"""Source-Shielded Updates on megatron-core: teach an instruct model a language, keep what it could do."""

from megatron_ssu.engine.imports import hide_cuda_only

__version__ = "0.1.0"

hide_cuda_only()
