"""Values of the run file that are written as text and read as numbers."""

from __future__ import annotations

import re

from megatron_ssu.errors import UserError


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
