"""The machine under the trainer: CPU backend of megatron-core, process groups, agreement of ranks.

This is the only module that patches megatron-core or torch.
"""

from __future__ import annotations

import datetime
import functools
import os
import queue
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_ssu.errors import UserError, agreed_error

T = TypeVar("T")


def has_cuda() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """Where this rank's tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def device_name() -> str:
    """What the maker calls the GPU of this rank, or 'cpu'."""
    return torch.cuda.get_device_name() if has_cuda() else "cpu"


class _Stream:
    """Stands for a CUDA stream or event where everything runs in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _to_cpu(factory: Callable) -> Callable:
    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)  # on the way to a GPU
        return factory(*args, **kwargs)

    return wrapper


def install_cpu_backend() -> None:
    """Let unmodified megatron-core 0.16 run on CPU and gloo. Does nothing where CUDA is, or when called again."""
    if has_cuda() or getattr(torch.cuda, "_megatron_ssu_cpu", False):
        return
    if sys.modules.get("transformer_engine") is not None:
        raise RuntimeError("without CUDA megatron_ssu must be imported before Transformer Engine and megatron-core")
    cpu = torch.device("cpu")
    with cpu:  # torch lists the factories that device contexts change at the first use: those before they are replaced
        torch.empty(0)
    cuda = {
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
        "_megatron_ssu_cpu": True,
    }
    for name, value in cuda.items():
        setattr(torch.cuda, name, value)
    for name in ("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn"):
        setattr(torch, name, _to_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign,assignment]

    stock_type = torch.Tensor.type

    def tensor_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # The optimizer tells precisions apart by 'torch.cuda.FloatTensor' and the like.
        if dtype is None:
            return stock_type(self).replace("torch.", "torch.cuda.", 1)
        return stock_type(self, dtype, *args, **kwargs)

    torch.Tensor.type = tensor_type  # type: ignore[method-assign,assignment]
    random = tensor_parallel.random
    random._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    _skip_exchange_of_one()


def _skip_exchange_of_one() -> None:
    """A data-parallel group of one has nothing to reduce or to gather; NCCL knows, gloo copies the whole buffer."""
    from megatron.core.distributed import param_and_grad_buffer as module

    class Done:
        def wait(self) -> None:
            pass

    def alone(group: Any) -> bool:
        return group is not None and group.size() == 1

    def unless_alone(stock: Callable) -> Callable:
        return lambda *args, **kwargs: None if alone(kwargs.get("group")) else stock(*args, **kwargs)

    coalescing = module._coalescing_manager

    def manager(group: Any, async_ops: bool) -> Any:
        return nullcontext(Done()) if alone(group) else coalescing(group, async_ops=async_ops)

    module._coalescing_manager = manager
    module.dist_all_gather_func = unless_alone(module.dist_all_gather_func)
    module.dist_reduce_scatter_func = unless_alone(module.dist_reduce_scatter_func)


@dataclass(frozen=True)
class Mesh:
    """Sizes of the mesh and this rank's place in it."""

    world: int
    rank: int
    tensor: int
    tensor_rank: int
    pipeline: int
    pipeline_rank: int
    virtual: int | None
    context: int
    context_rank: int
    data: int
    data_rank: int

    @property
    def chunks(self) -> int:
        """Model chunks a rank holds."""
        return self.virtual or 1

    @property
    def first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline - 1

    def __str__(self) -> str:
        virtual = f" x {self.virtual} (virtual)" if self.virtual else ""
        context = f" x {self.context} (context)" if self.context > 1 else ""
        return f"{self.tensor} (tensor) x {self.pipeline} (pipeline){virtual}{context} x {self.data} (data)"


def world_size() -> int:
    """Ranks of this job, known before any process group is."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_processes(timeout_minutes: float = 30.0) -> None:
    """Join the job's process group: torchrun's, or a group of one when run alone."""
    install_cpu_backend()
    if dist.is_initialized():
        return
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if has_cuda():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} on this node; "
                "start as many ranks a node as it has GPUs"
            )
        torch.cuda.set_device(local_rank)
    backend = "nccl" if has_cuda() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def start_mesh(
    tensor: int = 1,
    pipeline: int = 1,
    virtual: int | None = None,
    context: int = 1,
    seed: int = 1234,
    timeout_minutes: float = 30.0,
) -> Mesh:
    """Build megatron's parallel groups over the running process group and seed its RNG trackers."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=context,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return Mesh(
        world=dist.get_world_size(),
        rank=dist.get_rank(),
        tensor=tensor,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline=pipeline,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        virtual=virtual,
        context=context,
        context_rank=parallel_state.get_context_parallel_rank(),
        data=parallel_state.get_data_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
    )


def stop_processes() -> None:
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextmanager
def distributed_optimizer_class(cls: type, **extra: Any) -> Iterator[None]:
    """While it lasts, `get_megatron_optimizer` builds `cls` (with `extra` arguments) for its DistributedOptimizer."""
    import megatron.core.optimizer as module

    stock = module.DistributedOptimizer
    module.DistributedOptimizer = functools.partial(cls, **extra)
    try:
        yield
    finally:
        module.DistributedOptimizer = stock


@contextmanager
def in_process_checkpoint_writers() -> Iterator[None]:
    """While it lasts, checkpoints are written by the calling process.

    megatron forks writer processes and starts a manager process for their results: seconds for every save, and no fork is
    safe beside CUDA and data loader threads.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async as module

    writer = module.FileSystemWriterAsync
    stock = writer.__dict__["write_preloaded_data_multiproc"], module._get_write_results_queue
    writer.write_preloaded_data_multiproc = staticmethod(_write_in_process)
    module._get_write_results_queue = queue.Queue
    try:
        yield
    finally:
        writer.write_preloaded_data_multiproc, module._get_write_results_queue = stock


def _write_in_process(transforms: list, use_msc: bool, rank: int, buckets: list, results: Any) -> None:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    written: Any = {}
    for index, bucket in enumerate(buckets):
        local, running = queue.Queue(), queue.Queue()  # type: ignore[var-annotated]
        running.put(index)
        FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, local, running, True, use_msc=use_msc)
        _, outcome = local.get()
        if isinstance(outcome, Exception):
            written = outcome
            break
        written[index] = outcome
    results.put(written)


@contextmanager
def kept_common_errors() -> Iterator[list[BaseException]]:
    """While it lasts, what rank 0 meets when it writes a checkpoint's common part is put in the list, not raised.

    The other ranks are in a collective by then and would wait for rank 0.
    """
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy

    errors: list[BaseException] = []
    stock = TorchCommonSaveStrategy.save_common

    def save_common(self: Any, state: Any, folder: Any) -> None:
        try:
            stock(self, state, folder)
        except Exception as error:
            errors.append(error)

    TorchCommonSaveStrategy.save_common = save_common
    try:
        yield errors
    finally:
        TorchCommonSaveStrategy.save_common = stock


@contextmanager
def weights_only_checkpoints() -> Iterator[None]:
    """While it lasts, objects in sharded checkpoints are read with torch's weights-only unpickler."""
    import io

    from torch.distributed.checkpoint import default_planner

    planner = default_planner.DefaultLoadPlanner
    stock = planner.load_bytes

    def load_bytes(self: Any, read_item: Any, value: Any) -> None:
        with torch.serialization.safe_globals([io.BytesIO]):
            loaded = torch.load(value, weights_only=True)
        checked = io.BytesIO()
        torch.save(loaded, checked)
        checked.seek(0)
        stock(self, read_item, checked)

    planner.load_bytes = load_bytes  # type: ignore[method-assign]
    try:
        yield
    finally:
        planner.load_bytes = stock  # type: ignore[method-assign]


def is_rank_zero() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run `work` on rank 0; every rank gets its result, or raises its UserError alike.

    Raises:
        UserError: the one that rank 0 raised.
        RuntimeError: on the other ranks when rank 0 met a bug; rank 0 keeps the traceback.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    verdict: list[Any] = [None, None]
    bug: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            verdict = ["done", work()]
        except UserError as error:
            verdict = ["refused", str(error)]
        except Exception as error:
            verdict, bug = ["failed", f"{type(error).__name__}: {error}"], error
    dist.broadcast_object_list(verdict, src=0)
    if bug is not None:
        raise bug
    if verdict[0] == "refused":
        raise agreed_error(verdict[1])
    if verdict[0] == "failed":
        raise RuntimeError(f"rank 0 failed: {verdict[1]}")
    return verdict[1]


def gathered(value: T) -> list[T]:
    """Every rank's `value`, in the order of ranks; collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_all_ranks(work: Callable[[], T]) -> T:
    """Run `work` on every rank; if any rank raises a UserError all raise the first one (by rank), so none waits for it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    result, message = None, None
    try:
        result = work()
    except UserError as error:
        message = str(error)
    first = next((m for m in gathered(message) if m is not None), None)
    if first is not None:
        raise agreed_error(first)
    return result  # type: ignore[return-value]
