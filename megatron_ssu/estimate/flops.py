"""Model FLOPs of a token and peaks of known GPUs, for FLOP/s and MFU."""

from __future__ import annotations

from megatron_ssu.models.family import Dims, Family

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


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU, or None for one that is not in the table."""
    words = f"{device_name} "
    found = (tflops for name, tflops in PEAK_TFLOPS.items() if f"{name} " in words or f"{name}-" in words)
    tflops = next(found, None)
    return None if tflops is None else tflops * 1e12


def flops_per_token(family: Family, dims: Dims, sequence_length: int) -> float:
    """Forward and backward FLOPs of a token: 6 for every weight of a matrix product, 12 * width * length for attention.

    The usual count, without recomputation and with attention's whole square; weight gradients that a shield saves
    count as done, so that shielded and plain runs compare.
    """
    matrices = tuple(family.matrices(dims))
    weights = sum(m.elements for m in matrices if m.scored or m.kind == "head")
    if not any(m.kind == "head" for m in matrices):  # tied to the embedding
        weights += sum(m.elements for m in matrices if m.kind == "embedding")
    layers = {m.layer for m in matrices if m.layer is not None}
    width = next(m.shape[0] for m in matrices if m.kind == "q_proj")
    return 6.0 * weights + 12.0 * len(layers) * width * sequence_length
