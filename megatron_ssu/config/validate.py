"""Everything about a run that can be checked without weights, section by section: see `checks`.

Pure functions of the run file, the world size and the model's config.json; no process group, no CUDA context. Each
raises UserError with the key, the value and what would do.
"""

from __future__ import annotations

from typing import Any

from megatron_ssu.config.checks.checkpoint import validate_checkpoint
from megatron_ssu.config.checks.evaluate import validate_evaluate
from megatron_ssu.config.checks.mesh import validate_mesh
from megatron_ssu.config.checks.model import validate_model
from megatron_ssu.config.checks.precision import validate_precision
from megatron_ssu.config.checks.train import validate_train
from megatron_ssu.config.schema import RunConfig


def validate_run(
    run: RunConfig,
    world_size: int,
    hf: dict[str, Any],
    *,
    training: bool = True,
    writing: bool = True,
    shields: bool = True,
) -> None:
    """All checks but those of the method and its shield.

    Without `training` those that `score` needs (mesh, precision, model, where it writes), without `writing` those that `export`
    does (mesh, precision, model). `shields`: whether weights may be frozen in part.
    """
    dp = validate_mesh(run, world_size, shields=shields)
    validate_precision(run)
    validate_model(run, hf, training=training)
    if training:
        validate_train(run, dp)
        validate_evaluate(run)
    elif writing:
        validate_checkpoint(run)
