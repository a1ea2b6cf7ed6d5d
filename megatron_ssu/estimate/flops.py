"""Model FLOPs of a token, for FLOP/s and MFU."""

from __future__ import annotations

from megatron_ssu.models.family import Dims, Family


def token_share(dims: Dims, *, expert: bool) -> float:
    """Fraction of a batch's tokens that a weight multiplies: of an expert the average one's, if the router is even."""
    return dims.experts.share if expert and dims.experts is not None else 1.0


def flops_per_token(family: Family, dims: Dims, sequence_length: int) -> float:
    """Forward and backward FLOPs of a token: 6 for every weight of a GEMM, 12 * width * length for attention.

    The usual count, without recomputation and with attention's whole square; weight gradients that a shield saves
    count as done, so that shielded and plain runs compare. Of experts those count that a token goes through.
    """
    weights = 0.0
    for layer in range(dims.layers):
        for entry, expert in family.entries(dims, layer):
            share = token_share(dims, expert=expert is not None)
            multiplied = (m for m in entry.matrices(dims, layer, expert) if m.scored or m.kind == "router")
            weights += share * sum(m.elements for m in multiplied)
    weights += dims.vocab * dims.hidden  # of the head, its own or the embedding
    return 6.0 * weights + 12.0 * dims.layers * dims.heads * dims.head * sequence_length
