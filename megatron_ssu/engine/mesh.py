"""Process groups: the job's, and megatron's mesh over it."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_ssu.engine.cpu_backend import install_cpu_backend
from megatron_ssu.engine.device import has_cuda
from megatron_ssu.errors import UserError


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
    expert: int = 1
    expert_rank: int = 0
    expert_data: int = 1  # ranks of the stage that hold the same experts
    expert_data_rank: int = 0

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
        expert = f", {self.expert} (expert)" if self.expert > 1 else ""
        return f"{self.tensor} (tensor) x {self.pipeline} (pipeline){virtual}{context} x {self.data} (data){expert}"

    def first_replica(self, *, expert: bool) -> bool:
        """Whether this rank is the first of those that hold the same weights, of experts or of all else."""
        return self.expert_data_rank == 0 if expert else self.data_rank == 0 and self.context_rank == 0


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
                "start as many ranks per node as it has GPUs"
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
    expert: int = 1,
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
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=1,  # an expert is never split: each rank has whole ones
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return current_mesh()


def current_mesh() -> Mesh:
    """The mesh of megatron's parallel groups as they are now, whoever made them."""
    return Mesh(
        world=dist.get_world_size(),
        rank=dist.get_rank(),
        tensor=parallel_state.get_tensor_model_parallel_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        virtual=parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        context=parallel_state.get_context_parallel_world_size(),
        context_rank=parallel_state.get_context_parallel_rank(),
        data=parallel_state.get_data_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        expert=parallel_state.get_expert_model_parallel_world_size(),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_data=parallel_state.get_expert_data_parallel_world_size(),
        expert_data_rank=parallel_state.get_expert_data_parallel_rank(),
    )


def replica_group(*, expert: bool = False) -> dist.ProcessGroup:
    """The ranks that hold the same weights as this one, itself among them: of experts, or of all else."""
    if expert:
        return parallel_state.get_expert_data_parallel_group()
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def stop_processes() -> None:
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
