"""Work and traffic of one training step, and how long a GPU takes for them.

Seconds are those of the busiest stage: products at a share of the GPU's peak, then what is not hidden behind them.
Tensor-parallel traffic is exposed, pipeline stages wait (P - 1) / (V M) of the time (Narayanan et al. 2021, arXiv 2104.04473),
gradient reduction and weight gathering are exposed unless overlapped, the optimizer works at memory bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ssu.estimate.gpus import Gpu

GPUS_A_NODE = 8
MATH, LINKS, MEMORY = 0.6, 0.7, 0.8  # shares of peak that are reached: products, links and network, memory


@dataclass(frozen=True)
class Work:
    """FLOPs of one rank of the busiest stage in a step."""

    products: float  # linear layers and head: forward, input gradient, weight gradients of trainable columns
    attention: float
    recomputed: float
    full: float  # products if all weights were trained

    @property
    def total(self) -> float:
        return self.products + self.attention + self.recomputed


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step."""

    tensor: float
    pipeline: float
    data: float


@dataclass(frozen=True)
class StepTime:
    """Seconds."""

    products: float
    tensor: float
    pipeline: float
    bubble: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.products + self.tensor + self.pipeline + self.bubble + self.data + self.optimizer


@dataclass(frozen=True)
class Mesh:
    """What a step's time depends on."""

    tensor: int
    pipeline: int
    virtual: int
    data: int
    micro_batches: int
    overlap: bool  # gradient reduction and weight gathering beside forward and backward

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data


def step_time(
    work: Work, traffic: Traffic, optimizer_bytes: float, mesh: Mesh, gpu: Gpu, *, fp8: bool, math: float = MATH
) -> StepTime:
    """`optimizer_bytes`: read and written by a rank; `math`: share of the peak that products reach."""
    peak = (gpu.fp8 if fp8 and gpu.fp8 else gpu.bf16) * 1e12
    # Attention stays in bf16.
    products = (work.products + work.recomputed) / (math * peak) + work.attention / (math * gpu.bf16 * 1e12)
    link, network = LINKS * gpu.link * 1e9, LINKS * gpu.network * 1e9
    tensor = traffic.tensor / (link if mesh.tensor <= GPUS_A_NODE else network)
    one_node = mesh.world <= GPUS_A_NODE
    pipeline = traffic.pipeline / (link if one_node else network)
    bubble = (products + tensor) * (mesh.pipeline - 1) / (mesh.virtual * mesh.micro_batches)
    data = traffic.data / (link if one_node else network)
    if mesh.overlap:
        data = max(0.0, data - products)
    optimizer = optimizer_bytes / (MEMORY * gpu.memory_bandwidth * 1e9)
    return StepTime(products, tensor, pipeline, bubble, data, optimizer)
