"""What is there already and must stay."""

from __future__ import annotations

from megatron_ssu.config.schema import RunConfig
from megatron_ssu.errors import UserError
from megatron_ssu.train.latest import checkpoints_folder, latest_iteration


def refuse_given(command: str, key: str, given: str | None) -> None:
    """Raises UserError for a file of the user's that the command would replace."""
    if given is not None:
        raise UserError(f"{key}: {given} was made before and `{command}` does not replace it; leave the key out")


def has_begun(run: RunConfig) -> bool:
    """Whether the run has checkpoints; its shield may then not change."""
    return latest_iteration(checkpoints_folder(run.checkpoint.directory)) is not None
