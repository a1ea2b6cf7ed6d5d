"""Source-Shielded Updates on megatron-core: teach an instruct model a language, keep what it could do.

    import megatron_ssu as ssu

is the library (docs/api.md). What it offers is imported at first use, torch and megatron-core with it where they are needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megatron_ssu.engine.imports import hide_cuda_only

if TYPE_CHECKING:
    from megatron_ssu.api import apply, inspect, load_shield, load_weights, plan, score, verify
    from megatron_ssu.compact.applied import AppliedShield
    from megatron_ssu.engine.cpu_backend import cpu_backend
    from megatron_ssu.errors import UserError
    from megatron_ssu.scoring.scores_file import Scores
    from megatron_ssu.shield.inspect import Inspection
    from megatron_ssu.shield.shield_file import Shield
    from megatron_ssu.shield.verify import VerifyReport

__all__ = [
    "AppliedShield",
    "Inspection",
    "Scores",
    "Shield",
    "UserError",
    "VerifyReport",
    "apply",
    "cpu_backend",
    "inspect",
    "load_shield",
    "load_weights",
    "plan",
    "score",
    "verify",
]
__version__ = "0.1.0"

_PLACES = {
    **dict.fromkeys(("apply", "inspect", "load_shield", "load_weights", "plan", "score", "verify"), "megatron_ssu.api"),
    "AppliedShield": "megatron_ssu.compact.applied",
    "Inspection": "megatron_ssu.shield.inspect",
    "Scores": "megatron_ssu.scoring.scores_file",
    "Shield": "megatron_ssu.shield.shield_file",
    "UserError": "megatron_ssu.errors",
    "VerifyReport": "megatron_ssu.shield.verify",
    "cpu_backend": "megatron_ssu.engine.cpu_backend",
}

hide_cuda_only()


if not TYPE_CHECKING:  # type checkers read the imports above

    def __getattr__(name: str) -> Any:
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_PLACES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
