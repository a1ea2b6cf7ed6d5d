"""GPUs by name: what their makers' data sheets say, for estimates."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ssu.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """Dense peaks and bandwidths of one GPU in its usual server of 8."""

    name: str
    bf16: float  # TFLOP/s, without sparsity
    fp8: float | None  # None: has none
    memory_gb: float  # 10^9 bytes
    memory_bandwidth: float  # GB/s
    link: float  # GB/s in one direction to the other GPUs of its server (NVLink)
    network: float = 50.0  # GB/s in one direction out of the server, for each GPU (one 400 Gbit/s port)


# NVIDIA data sheets: A100 80GB SXM (2021), H100 SXM and H200 SXM (2024), B200 in HGX B200 (2025).
GPUS = {
    "a100": Gpu("A100-SXM-80GB", 312, None, 80, 2039, 300, 25.0),
    "h100": Gpu("H100-SXM-80GB", 989, 1979, 80, 3350, 450),
    "h200": Gpu("H200-SXM-141GB", 989, 1979, 141, 4800, 450),
    "b200": Gpu("B200-SXM-180GB", 2250, 4500, 180, 7700, 900),
}


def gpu_named(name: str) -> Gpu:
    """Raises UserError, naming the known ones."""
    found = GPUS.get(name.lower())
    if found is None:
        raise UserError(f"--gpu: {name!r} is not known; known are {', '.join(GPUS)}")
    return found
