"""megatron-core on CPU and gloo: replacements for what it takes from CUDA."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.distributed import param_and_grad_buffer as buffers

from megatron_ssu.engine.device import has_cuda
from megatron_ssu.engine.private_names import owner_of

_FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn")
_INHERITED = object()  # stands for a name that its owner had from a base class
_stock: dict[str, Any] = {}  # dotted path -> what its owner held before, or _INHERITED


def install_cpu_backend() -> bool:
    """Let unmodified megatron-core run on CPU and gloo. Does nothing where CUDA is, or when called again.

    Returns whether anything was replaced. `uninstall_cpu_backend` undoes it.
    """
    if has_cuda() or _stock:
        return False
    if sys.modules.get("transformer_engine") is not None:
        raise RuntimeError("without CUDA megatron_ssu must be imported before Transformer Engine and megatron-core")
    with torch.device("cpu"):  # torch lists the factories that device contexts change at the first use: the stock ones
        torch.empty(0)
    for path, replacement in _replacements().items():
        owner, name = owner_of(path)
        _stock[path] = vars(owner).get(name, _INHERITED)
        setattr(owner, name, replacement)
    return True


def uninstall_cpu_backend() -> None:
    """Put back everything that `install_cpu_backend` replaced; does nothing where nothing is replaced.

    What other modules copied by name while it was installed (`from torch.cuda import Stream`) stays as they copied it.
    """
    while _stock:
        path, before = _stock.popitem()
        owner, name = owner_of(path)
        if before is _INHERITED:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def cpu_backend() -> Iterator[None]:
    """`install_cpu_backend` while it lasts. One that was installed before stays installed afterwards."""
    installed = install_cpu_backend()
    try:
        yield
    finally:
        if installed:
            uninstall_cpu_backend()


def is_installed() -> bool:
    """Whether megatron-core's and torch's names are replaced at the moment."""
    return bool(_stock)


def replaced_names() -> tuple[str, ...]:
    """Dotted paths of all that `install_cpu_backend` replaces."""
    return tuple(_replacements())


def stock(path: str) -> Any:
    """What megatron-core or torch has at a dotted path, replaced here or not. Raises ImportError or AttributeError."""
    owner, name = owner_of(path)
    before = _stock.get(path, _INHERITED)
    if before is not _INHERITED:
        return before
    return getattr(super(owner, owner), name) if path in _stock else getattr(owner, name)


def _replacements() -> dict[str, Any]:
    """What is put in the place of what, by dotted path."""
    return {
        **{f"torch.cuda.{name}": value for name, value in _cuda().items()},
        **{f"torch.{name}": _to_cpu(getattr(torch, name)) for name in _FACTORIES},
        "torch.Tensor.cuda": lambda self, *a, **k: self,
        "torch.Tensor.type": _cuda_type_of(torch.Tensor.type),
        "megatron.core.tensor_parallel.random._get_cuda_rng_state": lambda *a, **k: torch.get_rng_state(),
        "megatron.core.tensor_parallel.random._set_cuda_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
        **_exchanges(),
    }


class _Stream:
    """Stands for a CUDA stream or event where everything runs in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _cuda() -> dict[str, Any]:
    """Replacements for members of torch.cuda."""
    cpu = torch.device("cpu")
    return {
        "current_device": lambda: cpu,
        "set_device": lambda *a: None,
        "synchronize": lambda *a: None,
        "Stream": _Stream,
        "Event": _Stream,
        "stream": lambda *a: nullcontext(),
        "current_stream": lambda *a: _Stream(),
        "default_stream": lambda *a: _Stream(),
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda *a, **k: torch.get_rng_state(),
        "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
    }


def _to_cpu(factory: Callable) -> Callable:
    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)  # on the way to a GPU
        return factory(*args, **kwargs)

    return wrapper


def _cuda_type_of(stock_type: Callable) -> Callable:
    """`Tensor.type` for an optimizer that distinguishes dtypes by 'torch.cuda.FloatTensor' and the like."""

    def tensor_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return stock_type(self).replace("torch.", "torch.cuda.", 1)
        return stock_type(self, dtype, *args, **kwargs)

    return tensor_type


def _exchanges() -> dict[str, Any]:
    """DDP's exchanges, left out in a group of one, which has nothing to exchange: NCCL knows, gloo copies the buffer."""

    class Done:
        def wait(self) -> None:
            pass

    def alone(group: Any) -> bool:
        return group is not None and group.size() == 1

    def unless_alone(stock: Callable) -> Callable:
        return lambda *args, **kwargs: None if alone(kwargs.get("group")) else stock(*args, **kwargs)

    coalescing = buffers._coalescing_manager

    def manager(group: Any, async_ops: bool) -> Any:
        return nullcontext(Done()) if alone(group) else coalescing(group, async_ops=async_ops)

    return {
        f"{buffers.__name__}._coalescing_manager": manager,
        f"{buffers.__name__}.dist_all_gather_func": unless_alone(buffers.dist_all_gather_func),
        f"{buffers.__name__}.dist_reduce_scatter_func": unless_alone(buffers.dist_reduce_scatter_func),
    }
