"""GPUs by name: what their makers' data sheets say, for estimates and MFU."""

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


# Dense bf16 TFLOP/s by what torch.cuda.get_device_name says, longer names first; from the makers' data sheets.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "GH200": 989.0,
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200": 989.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
}

# NVIDIA data sheets: A100 80GB SXM (2021), H100 SXM and H200 SXM (2024), B200 in HGX B200 (2025).
GPUS = {
    "a100": Gpu("A100-SXM-80GB", PEAK_TFLOPS["A100"], None, 80, 2039, 300, 25.0),
    "h100": Gpu("H100-SXM-80GB", PEAK_TFLOPS["H100"], 1979, 80, 3350, 450),
    "h200": Gpu("H200-SXM-141GB", PEAK_TFLOPS["H200"], 1979, 141, 4800, 450),
    "b200": Gpu("B200-SXM-180GB", PEAK_TFLOPS["B200"], 4500, 180, 7700, 900),
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU, or None for one that is not in the table."""
    words = f"{device_name} "
    found = (tflops for name, tflops in PEAK_TFLOPS.items() if f"{name} " in words or f"{name}-" in words)
    tflops = next(found, None)
    return None if tflops is None else tflops * 1e12


def gpu_named(name: str) -> Gpu:
    """Raises UserError, naming the known ones."""
    found = GPUS.get(name.lower())
    if found is None:
        raise UserError(f"--gpu: {name!r} is not known; known are {', '.join(GPUS)}")
    return found
