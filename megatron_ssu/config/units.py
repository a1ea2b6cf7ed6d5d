"""Values of the run file that are written as text and read as numbers."""

from __future__ import annotations

import re

from megatron_ssu.config.coerce import show
from megatron_ssu.errors import UserError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_split(split: str) -> tuple[float, float, float]:
    """The fractions of data.split for train, valid and test: numbers that add up to 1.

    `split` holds one to three numbers of at least 0, in any unit and the first above 0; missing ones are 0: '99,1,0', '8,2'.
    Raises UserError for anything else.
    """
    parts = split.split(",")
    if len(parts) > 3 or not all(re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*", part) for part in parts):
        raise UserError(
            f"data.split: must be up to three numbers of at least 0 (train,valid,test), got {split!r}; write for example "
            "'99,1,0'"
        )
    numbers = [float(part) for part in parts] + [0.0] * (3 - len(parts))
    if numbers[0] <= 0:
        raise UserError(f"data.split: {split!r} leaves nothing to train on; the first number must be above 0")
    total = sum(numbers)
    return numbers[0] / total, numbers[1] / total, numbers[2] / total


def parse_size(size: str | int, key: str = "checkpoint.max_shard_size") -> int:
    """Bytes of '5GB', '512 MiB' or a plain number; KB, MB, GB, TB count by 1000, KiB ... by 1024. Raises UserError."""
    if isinstance(size, int) and not isinstance(size, bool):
        parsed: float = size
    else:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?", str(size).strip().upper())
        unit = UNITS.get(match[2] or "B") if match else None
        if match is None or unit is None:
            raise UserError(f"{key}: must be a size such as 5GB, 512MiB or a number of bytes, got {show(size)}")
        parsed = float(match[1]) * unit
    if parsed < 1:
        raise UserError(f"{key}: {show(size)} is less than one byte; write for example 5GB")
    return int(parsed)


def seconds(budget: str | float | None, key: str = "train.exit_after") -> float | None:
    """Seconds of a budget in minutes, or as 'HH:MM:SS' or 'D-HH:MM:SS'. Raises UserError."""
    if budget is None:
        return None
    found: float | None = None
    if isinstance(budget, str):
        match = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]?\d):([0-5]?\d)", budget.strip())
        if match:
            days, hours, minutes, rest = (int(part or 0) for part in match.groups())
            found = ((days * 24 + hours) * 60 + minutes) * 60 + rest
        elif re.fullmatch(r"\d+(\.\d+)?", budget.strip()):
            found = float(budget) * 60
    elif not isinstance(budget, bool):
        found = float(budget) * 60
    if found is None or not 0 < found < float("inf"):
        raise UserError(f"{key}: must be minutes, such as 110, or '01:50:00', got {budget!r}")
    return found
