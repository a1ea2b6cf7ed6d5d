"""Where a run's checkpoints lie, and which is the newest. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from megatron_ssu.errors import UserError

LATEST = "latest"


def checkpoints_folder(directory: str | Path) -> Path:
    """The folder of the checkpoints of the run in `directory`."""
    return Path(directory) / "checkpoints"


def checkpoint_path(folder: Path, iteration: int) -> Path:
    return folder / f"iter_{iteration:07d}"


def latest_iteration(folder: Path) -> int | None:
    """Iteration of the newest complete checkpoint in `folder`, or None. Raises UserError for a damaged `latest`."""
    file = folder / LATEST
    if not file.exists():
        return None
    text = file.read_text(errors="replace").strip()
    if not text.isdecimal() or not checkpoint_path(folder, int(text)).is_dir():
        raise UserError(
            f"{file}: must be the iteration of a checkpoint in {folder}, got {text[:40]!r}; write one that is there"
        )
    return int(text)
