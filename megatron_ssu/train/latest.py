"""Where a run's checkpoints lie, and which is the newest. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from megatron_ssu.errors import UserError
from megatron_ssu.io.atomic import write_text

LATEST = "latest"
BEST = "best"


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


def best_iteration(folder: Path) -> int | None:
    """Iteration of the checkpoint in `folder` that evaluate.best chose, or None."""
    file = folder / BEST
    text = file.read_text(errors="replace").strip() if file.exists() else ""
    return int(text) if text.isdecimal() and checkpoint_path(folder, int(text)).is_dir() else None


def write_best(folder: Path, iteration: int) -> None:
    """Name a checkpoint the best. Raises UserError."""
    write_text(folder / BEST, f"{iteration}\n")
