"""Source-Shielded Updates on megatron-core: teach an instruct model a language, keep what it could do."""

__version__ = "0.1.0"
