"""Packages that are installed only where they are wanted: the extras of pyproject.toml."""

from __future__ import annotations

import importlib.util

from megatron_ssu.errors import UserError


def installed(package: str) -> bool:
    """Whether `package` can be found; it is not imported."""
    return importlib.util.find_spec(package) is not None


def require(what: str, package: str, extra: str) -> None:
    """Raises UserError where `what` (a key or an option) needs a `package` that is not installed; `extra` brings it."""
    if not installed(package):
        raise UserError(
            f'{what}: needs {package}, which is not installed; pip install "megatron-ssu[{extra}]", or leave it out'
        )
