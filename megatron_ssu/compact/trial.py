"""Small compact weight gradients before training, beside the whole one of the same layer."""

from __future__ import annotations

import logging
from typing import Any

import torch

from megatron_ssu.compact.rules import padded
from megatron_ssu.compact.selection import Blocks, Picked, Together, Workspace
from megatron_ssu.engine import te_gemm
from megatron_ssu.engine.linear import Gemm
from megatron_ssu.engine.ranks import gathered, is_rank_zero

log = logging.getLogger(__name__)

TOKENS, INPUTS, OUTPUTS = 128, 128, 96
TOLERANCE = 1e-3  # of the largest gradient: both read the same operands and sum in fp32


def tried_gemm(config: Any) -> Gemm | None:
    """The GEMM for compact gradients of Transformer Engine's layers, in the precision of `config` (a TransformerConfig).

    None, with a warning, where what it computes is not what the layer's own computes, on any rank; None without Transformer
    Engine, and for FP4. Collective.
    """
    if not te_gemm.is_available() or config.fp4:
        return None
    columns = [torch.arange(1, INPUTS, step).cuda() for step in (3, 2)]
    inputs = Together([Picked(own, INPUTS, padded(len(own))) for own in columns], Workspace())
    selected = inputs, [Blocks(groups=3, block=32, first=first, count=16) for first in (8, 0)]
    try:
        compact, whole = te_gemm.both_gradients(config, (TOKENS, INPUTS, OUTPUTS), selected)
        picked = te_gemm.pick(whole, selected)
        found, wanted = (torch.cat([part.flatten() for part in parts]) for parts in (compact, picked))
        error = float((found - wanted).abs().max() / wanted.abs().max())
        reason = "" if error <= TOLERANCE else f"it differs by {error:.1e} of the largest gradient"
    except Exception as problem:  # what Transformer Engine raises for operands that it does not take
        reason = " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
    reasons = [found for found in gathered(reason) if found]
    if not reasons:
        return te_gemm.multiply
    if is_rank_zero():
        log.warning(
            "weight gradients of trainable columns cannot be computed alone here, whole ones are: %s", reasons[0]
        )
    return None
