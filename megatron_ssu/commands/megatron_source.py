"""Source models that are Megatron checkpoints: written as a Hugging Face directory once, from which everything else follows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_ssu.config.schema import RunConfig
from megatron_ssu.engine.ranks import on_all_ranks, on_rank_zero
from megatron_ssu.errors import UserError
from megatron_ssu.models.hf_config import read_hf_config
from megatron_ssu.models.hf_files import EXPORT_RECORD
from megatron_ssu.models.source import Source, open_config

FOLDER = "source"  # within the run's directory


def take_megatron_source(run: RunConfig, check: Callable[[RunConfig], None]) -> None:
    """Where model.hf_path is set, write the Megatron checkpoint in model.path as <checkpoint.directory>/source, and have
    model.path name that; what is there from the same checkpoint stays. Collective, in the job's process group.

    `check` raises UserError for a run, whose model.path is the Hugging Face directory, that could not be built.
    """
    if run.model.hf_path is None:
        return
    from megatron_ssu.train.megatron_checkpoint import newest

    target = Path(run.checkpoint.directory) / FOLDER
    described = replace(run, model=replace(run.model, path=run.model.hf_path, hf_path=None))
    folder = on_rank_zero(lambda: newest(run.model.path, "model.path"))
    record = on_rank_zero(lambda: _record(folder, described))
    if not on_rank_zero(lambda: _is_made(target, record)):
        on_all_ranks(lambda: check(described))
        _convert(described, folder, target, record)
    run.model.path, run.model.hf_path = str(target), None


def convert(run: RunConfig, folder: Path, target: Path, record: dict[str, str]) -> None:
    """Write the checkpoint in `folder` as the Hugging Face directory `target`, on the run's mesh. Collective.

    The run's model.path is the directory of config and tokenizer. Raises UserError as `read_weights` and `export_as`.
    """
    from megatron_ssu.models.hf_export import export_as
    from megatron_ssu.models.parallel_model import open_model
    from megatron_ssu.train.megatron_checkpoint import read_weights

    source: Source = on_all_ranks(lambda: open_config(run.model.path, "model.hf_path"))
    session = open_model(run, source, load=False)
    read_weights(session, folder)
    size = 5 * 10**9
    dtype = {"bf16": "BF16", "fp32": "F32"}[run.precision.dtype]
    export_as(session.layout, session.mesh, source.path, target, size, dtype, json.dumps(record, indent=1) + "\n")


def _convert(run: RunConfig, folder: Path, target: Path, record: dict[str, str]) -> None:
    from megatron_ssu.train.run_lock import held

    with held(run.checkpoint.directory, "convert"):
        convert(run, folder, target, record)


def _record(folder: Path, run: RunConfig) -> dict[str, str]:
    """What a converted checkpoint follows from."""
    config = json.dumps(read_hf_config(run.model.path, "model.hf_path"), sort_keys=True)
    return {
        "megatron_checkpoint": str(folder.resolve()),
        "metadata": hashlib.sha256((folder / ".metadata").read_bytes()).hexdigest(),
        "config": hashlib.sha256(config.encode()).hexdigest(),
        "dtype": run.precision.dtype,
    }


def _is_made(target: Path, record: dict[str, str]) -> bool:
    """Whether it is there. Raises UserError where something else is."""
    if not target.exists():
        return False
    try:
        found = json.loads((target / EXPORT_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found != record:
        raise UserError(
            f"{target}: was made of another checkpoint, config.json or precision than model.path, model.hf_path and "
            "precision.dtype name now; name another checkpoint.directory, or remove it"
        )
    return True
