"""Every private name of megatron-core and torch that this folder uses, and every public one that it replaces or overrides.

An upgrade of either library that the tests find a name missing or changed in is a list: what it is called, what calls it.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

CORE = "megatron.core"
STRATEGIES = "megatron.core.dist_checkpointing.strategies"
SAVER = f"{STRATEGIES}.torch.TorchDistSaveShardedStrategy"
WRITER = f"{STRATEGIES}.filesystem_async.FileSystemWriterAsync"
BUFFERS = f"{CORE}.distributed.param_and_grad_buffer"
DATASET = f"{CORE}.datasets.gpt_dataset.GPTDataset"
LAYERS = f"{CORE}.tensor_parallel.layers"
OPTIMIZER = f"{CORE}.optimizer.distrib_optimizer.DistributedOptimizer"
HYBRID = f"{CORE}.optimizer.cpu_offloading.HybridDeviceOptimizer"
DCP = "torch.distributed.checkpoint"
_CPU = "cpu_backend:install_cpu_backend"
_SEAM = "linear:compute_with"
_WRITERS = "checkpoint_io:in_process_checkpoint_writers"


@dataclass(frozen=True)
class PrivateName:
    """A name of megatron-core or torch, and what it must be."""

    path: str  # dotted
    parameters: str  # names, as `signature` gives them; "" for anything but a Python function
    used_by: str  # module:function of this folder
    megatron: str = ""  # the versions of megatron-core that have it, as pip writes them; "" for all


NAMES = (
    PrivateName("torch.cuda.current_device", "", _CPU),
    PrivateName("torch.cuda.set_device", "device", _CPU),
    PrivateName("torch.cuda.synchronize", "device", _CPU),
    PrivateName("torch.cuda.Stream", "", _CPU),
    PrivateName("torch.cuda.Event", "", _CPU),
    PrivateName("torch.cuda.stream", "stream", _CPU),
    PrivateName("torch.cuda.current_stream", "device", _CPU),
    PrivateName("torch.cuda.default_stream", "device", _CPU),
    PrivateName("torch.cuda.manual_seed", "seed", _CPU),
    PrivateName("torch.cuda.get_rng_state", "device", _CPU),
    PrivateName("torch.cuda.set_rng_state", "new_state, device", _CPU),
    PrivateName("torch.empty", "", _CPU),
    PrivateName("torch.zeros", "", _CPU),
    PrivateName("torch.ones", "", _CPU),
    PrivateName("torch.full", "", _CPU),
    PrivateName("torch.tensor", "", _CPU),
    PrivateName("torch.arange", "", _CPU),
    PrivateName("torch.rand", "", _CPU),
    PrivateName("torch.randn", "", _CPU),
    PrivateName("torch.Tensor.cuda", "", _CPU),
    PrivateName("torch.Tensor.type", "", _CPU),
    PrivateName(f"{CORE}.tensor_parallel.random._get_cuda_rng_state", "device, clone, graph_safe", _CPU),
    PrivateName(f"{CORE}.tensor_parallel.random._set_cuda_rng_state", "new_state, device, graph_safe", _CPU),
    PrivateName(f"{BUFFERS}._coalescing_manager", "group, device, async_ops", _CPU),
    PrivateName(f"{BUFFERS}.dist_all_gather_func", "output_tensor, input_tensor, group, async_op", _CPU),
    PrivateName(f"{BUFFERS}.dist_reduce_scatter_func", "output, input, op, group, async_op", _CPU),
    PrivateName("torch.distributed.distributed_c10d._get_default_store", "", "ranks:job_store"),
    PrivateName("torch.distributed.distributed_c10d", "", "ranks:WAITING_FILES"),
    PrivateName(f"{CORE}.pipeline_parallel.p2p_communication", "", "ranks:WAITING_FILES"),
    PrivateName("torch._foreach_mul_", "", "tensors:scale_all"),
    PrivateName(f"{LAYERS}.ColumnParallelLinear._forward_impl", "self, input, weight, *args, **kwargs", _SEAM),
    PrivateName(f"{LAYERS}.RowParallelLinear._forward_impl", "self, input, weight, *args, **kwargs", _SEAM),
    PrivateName(f"{OPTIMIZER}._get_model_param_range_map", "self, param", "optimizer:owned"),
    PrivateName(f"{OPTIMIZER}._get_main_param_and_optimizer_states", "self, model_param", "optimizer:Owned"),
    PrivateName(f"{OPTIMIZER}._set_main_param_and_optimizer_states", "self, model_param, tensors", "optimizer:Owned"),
    PrivateName(f"{OPTIMIZER}._init_optimizer_states_with_dummy_values", "self", "optimizer:_step_over"),
    PrivateName(f"{HYBRID}._sync_hdo_state_to_sub_optimizers", "self", "optimizer:loaded"),
    PrivateName(f"{DATASET}._build_document_sample_shuffle_indices", "self", "datasets:OrderedGPTDataset"),
    PrivateName(f"{DATASET}._get_num_tokens_per_epoch", "self", "datasets:OrderedGPTDataset"),
    PrivateName(f"{SAVER}.async_save", "self, sharded_state_dict, checkpoint_dir", "checkpoint_io:Saver", "<0.17"),
    PrivateName(
        f"{SAVER}.async_save",
        "self, sharded_state_dict, checkpoint_dir, async_strategy",
        "checkpoint_io:Saver",
        ">=0.17",
    ),
    PrivateName(
        f"{SAVER}._get_save_and_finalize_callbacks", "self, writer, save_state_dict_ret", "checkpoint_io:Saver", "<0.17"
    ),
    PrivateName(
        f"{SAVER}._get_save_and_finalize_callbacks",
        "self, writer, save_state_dict_ret, async_strategy",
        "checkpoint_io:Saver",
        ">=0.17",
    ),
    PrivateName(f"{STRATEGIES}.torch._logged_mcore_async_deprecation", "", "checkpoint_io:Saver", ">=0.17"),
    PrivateName(f"{WRITER}.finish", "self, metadata, results", "checkpoint_io:Saver"),
    PrivateName(
        f"{WRITER}.write_preloaded_data",
        "transform_list, local_proc_idx, write_bucket, results_queue, count_queue, use_fsync, **kwargs",
        _WRITERS,
    ),
    PrivateName(
        f"{WRITER}.write_preloaded_data_multiproc",
        "transform_list, use_msc, rank, write_buckets, global_results_queue",
        _WRITERS,
        "<0.17",
    ),
    PrivateName(
        f"{WRITER}.write_preloaded_data_multithread",
        "transform_list, use_msc, rank, write_buckets, global_results_queue",
        _WRITERS,
        ">=0.17",
    ),
    PrivateName(f"{STRATEGIES}.filesystem_async._get_write_results_queue", "", _WRITERS, "<0.17"),
    PrivateName(f"{STRATEGIES}.filesystem_async.get_write_results_queue", "mp_mode", _WRITERS, ">=0.17"),
    PrivateName(f"{WRITER}.preload_tensors", "write_buckets, non_blocking", "checkpoint_io:watched"),
    PrivateName(
        f"{STRATEGIES}.common.TorchCommonSaveStrategy.save_common",
        "self, common_state_dict, checkpoint_dir",
        "checkpoint_io:owner_of_save_common",
        "<0.17",
    ),
    PrivateName(
        f"{CORE}.dist_checkpointing.serialization.save_common",
        "common_state_dict, checkpoint_dir",
        "checkpoint_io:owner_of_save_common",
        ">=0.17",
    ),
    PrivateName(
        f"{DCP}.default_planner.DefaultLoadPlanner.load_bytes",
        "self, read_item, value",
        "checkpoint_io:weights_only_checkpoints",
    ),
    PrivateName(f"{DCP}.metadata._MEM_FORMAT_ENCODING", "", "checkpoint_io:check_metadata"),
    PrivateName(f"{DCP}.filesystem._StorageInfo", "", "checkpoint_io:check_metadata"),
    PrivateName("torch.serialization._get_layout", "name", "checkpoint_io:check_metadata"),
)


def owner_of(path: str) -> tuple[Any, str]:
    """The object that holds what the dotted `path` names, and the name in it. Raises ImportError or AttributeError."""
    parts = path.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:-1]:
            owner = getattr(owner, part)
        return owner, parts[-1]
    raise ImportError(f"no module on the way to {path}")


def signature(thing: Any) -> str:
    """Names of a Python function's parameters, with their stars; "" for anything else."""
    if not inspect.isroutine(thing):
        return ""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except ValueError:  # compiled
        return ""
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return ", ".join(stars.get(parameter.kind, "") + parameter.name for parameter in parameters)
