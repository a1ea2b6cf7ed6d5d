"""Model FLOPs of a token, for FLOP/s and MFU."""

from __future__ import annotations

from megatron_ssu.models.family import Dims, Family


def flops_per_token(family: Family, dims: Dims, sequence_length: int) -> float:
    """Forward and backward FLOPs of a token: 6 for every weight of a GEMM, 12 * width * length for attention.

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
