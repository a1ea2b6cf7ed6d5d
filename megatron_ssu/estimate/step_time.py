"""Work and traffic of one training step, and how long a GPU takes for them.

Seconds are those of the busiest stage: GEMMs at a fraction of the GPU's peak, then what is not hidden behind them.
Tensor-parallel traffic is exposed, pipeline stages wait (P - 1) / (V M) of the time (Narayanan et al. 2021, arXiv 2104.04473),
gradient reduction and weight gathering are exposed unless overlapped; the optimizer, and the gathers of the columns and rows
that weight gradients of trainable elements need, work at memory bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ssu.estimate.hardware import Gpu

GPUS_PER_NODE = 8
MATH, LINKS, MEMORY = 0.6, 0.7, 0.8  # fractions of the peak that are reached: GEMMs, links and network, memory


@dataclass(frozen=True)
class Work:
    """FLOPs of one rank of the busiest stage in a step, and bytes of its gathers."""

    gemms: float  # linear layers and head: forward, input gradient, weight gradients of what they compute
    attention: float
    recomputed: float
    full: float  # `gemms` if all weights were trained
    gather: float  # bytes read and written to gather trainable columns and rows for weight gradients
    source: float  # the source model's forward pass, for train.regularize.kl; never in FP8

    @property
    def total(self) -> float:
        return self.gemms + self.attention + self.recomputed + self.source


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step."""

    tensor: float
    pipeline: float
    data: float
    expert: float = 0.0  # tokens on their way to experts and back


@dataclass(frozen=True)
class StepTime:
    """Seconds."""

    gemms: float
    gather: float
    tensor: float
    expert: float
    pipeline: float
    bubble: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        return (
            self.gemms
            + self.gather
            + self.tensor
            + self.expert
            + self.pipeline
            + self.bubble
            + self.data
            + self.optimizer
        )


@dataclass(frozen=True)
class Mesh:
    """What a step's time depends on."""

    tensor: int
    pipeline: int
    virtual: int
    data: int
    micro_batches: int
    expert: int
    overlap: bool  # gradient reduction and weight gathering beside forward and backward

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data


def step_time(
    work: Work, traffic: Traffic, optimizer_bytes: float, mesh: Mesh, gpu: Gpu, *, fp8: bool, math: float = MATH
) -> StepTime:
    """`optimizer_bytes`: read and written by a rank; `math`: fraction of the peak that GEMMs reach."""
    peak = (gpu.fp8 if fp8 and gpu.fp8 else gpu.bf16) * 1e12
    memory = MEMORY * gpu.memory_bandwidth * 1e9
    # Attention stays in bf16, and so does the source model.
    gemms = (work.gemms + work.recomputed) / (math * peak) + (work.attention + work.source) / (math * gpu.bf16 * 1e12)
    gather = work.gather / memory
    link, network = LINKS * gpu.link * 1e9, LINKS * gpu.network * 1e9
    tensor = traffic.tensor / (link if mesh.tensor <= GPUS_PER_NODE else network)
    # Expert-parallel ranks are neighbours, tensor-parallel ones among them.
    expert = traffic.expert / (link if mesh.expert <= GPUS_PER_NODE else network)
    one_node = mesh.world <= GPUS_PER_NODE
    pipeline = traffic.pipeline / (link if one_node else network)
    bubble = (gemms + gather + tensor + expert) * (mesh.pipeline - 1) / (mesh.virtual * mesh.micro_batches)
    data = traffic.data / (link if one_node else network)
    if mesh.overlap:
        data = max(0.0, data - gemms)
    return StepTime(gemms, gather, tensor, expert, pipeline, bubble, data, optimizer_bytes / memory)
