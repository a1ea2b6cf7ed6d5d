"""random: drawn from shield.seed, the matrix's name and the position, when a shield is planned."""

from __future__ import annotations

from megatron_ssu.scoring.base import Score

RANDOM = Score("random", needs="seed")
