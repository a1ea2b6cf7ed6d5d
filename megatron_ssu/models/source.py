"""The source model's files: what every command that names a model starts from. Reads no weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ssu.models.families import read_family
from megatron_ssu.models.family import Dims, Family
from megatron_ssu.models.hf_config import read_hf_config
from megatron_ssu.models.hf_files import HFCheckpoint
from megatron_ssu.models.hub import local_directory, model_name


@dataclass
class Source:
    """The source model's files, without a weight read."""

    path: Path
    hf: dict[str, Any]
    family: Family
    dims: Dims
    checkpoint: HFCheckpoint

    @property
    def name(self) -> str:
        """What files and messages call the model: its directory's name, or that of the hub."""
        return model_name(self.path)


def open_config(path: str | Path, key: str) -> Source:
    """Config and tokenizer alone: its checkpoint has no tensors. Raises UserError as `open_source` does of config.json."""
    hf = read_hf_config(str(path), key)
    family, dims = read_family(hf, path)
    return Source(local_directory(path), hf, family, dims, HFCheckpoint(path, weights=False))


def open_source(path: str | Path, key: str = "model.path") -> Source:
    """`key` named it. Raises UserError where the directory is not that of a supported model, or lacks files."""
    hf = read_hf_config(str(path), key)
    family, dims = read_family(hf, path)
    return Source(local_directory(path), hf, family, dims, HFCheckpoint(path))
