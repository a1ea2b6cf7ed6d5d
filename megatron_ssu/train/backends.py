"""Which library's code a run's layers and optimizer are, as objects were built, not as they were asked for."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from megatron_ssu.engine.device import local_device
from megatron_ssu.ops import kernels

# Package of a class -> what its maker calls it; the first that a class or one of its bases comes from counts.
_LIBRARIES = {"transformer_engine": "transformer-engine", "apex": "apex", "megatron": "megatron-core", "torch": "torch"}


def library(thing: object) -> str:
    """Name and version of the library that `thing`'s class, or the nearest base of it that matters, comes from."""
    packages = {cls.__module__.partition(".")[0] for cls in type(thing).__mro__}
    for package, name in _LIBRARIES.items():
        if package in packages:
            return f"{name} {_version(name)}"
    return "this package"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "(version unknown)"


def backends(chunks: list[Any], optimizer: Any, attention: str) -> str:
    """One line for the log: linear layers, attention (`attention` is the setting), Adam and the shield's kernels."""
    modules = [module for chunk in chunks for module in chunk.modules()]
    linear = [library(m.linear_qkv) for m in modules if hasattr(m, "linear_qkv")]
    core = [f"{library(m.core_attention)} ({attention})" for m in modules if hasattr(m, "core_attention")]
    steps = [m.optimizer for m in optimizer.chained_optimizers if not m.is_stub_optimizer]
    adam = [f"{library(step)} ({type(step).__name__})" for step in steps]
    named = (("linear layers", linear), ("attention", core), ("Adam", adam))
    parts = [f"{what}: {found[0] if found else 'none on this rank'}" for what, found in named]
    return "; ".join([*parts, f"shield kernels: {kernels.backend(local_device().type)}"])
