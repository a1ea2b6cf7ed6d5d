"""Checks of single numbers."""

from __future__ import annotations

from megatron_ssu.errors import UserError

MAX_SEED = 2**32 - 1  # numpy's


def seed_in_range(key: str, seed: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"{key}: must be a seed from 0 to {MAX_SEED}, got {seed}")


def at_least(key: str, value: float, least: int) -> None:
    """Refuse a `value` below `least` (or NaN)."""
    if not value >= least:
        raise UserError(f"{key}: must be at least {least}, got {value}")
