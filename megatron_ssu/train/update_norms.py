"""How far a step moved the trainable weights, by kind of matrix."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

from megatron_ssu.compact.parameters import CompactParameters
from megatron_ssu.engine.device import local_device
from megatron_ssu.engine.optimizer import MAIN, owned, steps
from megatron_ssu.models.layout import Layout
from megatron_ssu.models.matrix import KINDS

_JOINED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
_JOINED |= {"up_proj": "gate_up_proj", "centred_norm": "norm"}
CHUNK = 1 << 23  # elements; temporaries take some 20 bytes for each
NAMES = tuple(dict.fromkeys(_JOINED.get(kind, kind) for kind in KINDS))


def update_norms(optimizer: MegatronOptimizer, layout: Layout, compact: CompactParameters) -> dict[str, float]:
    """L2 norm of the last step's change of the fp32 main weights by kind; collective, between step and schedule.

    Pinned elements count with the weight decay of their main weights, which never reaches the model.

    Computed from Adam's moments, CHUNK elements at a time, so nothing is copied before the step and no temporary is as
    large as a shard. Matrices that megatron fuses (q, k, v; gate, up) are one kind.
    """
    # A tensor-parallel rank may hold nothing but the padding of embedding and head, which is of no matrix.
    kinds = {local.param: _kind(local.matrices[0].kind) for local in layout if local.pieces}
    squares = torch.zeros(len(NAMES), dtype=torch.float64, device=local_device())
    count = steps(optimizer)
    for part in owned(optimizer):
        found = compact.matrix(part.param)
        kind = kinds.get(part.param) if found is None else _kind(found[0].part.matrix.kind)
        if kind is None or getattr(part.param, "shared", False):
            continue
        if not param_is_not_tensor_parallel_duplicate(part.param):
            continue
        states = part.states()
        if "exp_avg" in states:
            decoupled = part.member.config.decoupled_weight_decay
            squares[NAMES.index(kind)] += change_square(states, count, part.group, decoupled).to(squares.device)
    dist.all_reduce(squares)
    return {f"update_norm_{name}": value for name, value in zip(NAMES, squares.sqrt().tolist()) if value > 0}


def _kind(kind: str) -> str:
    return _JOINED.get(kind, kind)


def change_square(states: dict[str, torch.Tensor], step: int, group: dict[str, Any], decoupled: bool) -> torch.Tensor:
    """float64 []: the sum of squares of what Adam added to the main weight (its value after the step) in the last step.

    Computed where the moments are: an optimizer on the CPU may have main weights on the GPU too.
    """
    parts = (t.detach().reshape(-1).split(CHUNK) for t in (states[MAIN], states["exp_avg"], states["exp_avg_sq"]))
    where = states["exp_avg"].device
    total = torch.zeros((), dtype=torch.float64, device=where)
    for after, mean, square in zip(*parts, strict=True):
        change = _adam_change(after.to(where), mean, square, step, group, decoupled)
        total += torch.linalg.vector_norm(change, dtype=torch.float64).square()
    return total


def _adam_change(
    after: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, step: float, group: dict[str, Any], decoupled: bool
) -> torch.Tensor:
    """float32 [n]: the last step's change of weights that are `after` now, from their moments [n]."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    spread = square.float().div(1 - beta2**step).sqrt_().add_(group["eps"])
    change = mean.float().div(1 - beta1**step).div_(spread).mul_(-lr)
    decay = lr * group["weight_decay"] if decoupled else 0.0
    if decay:  # decoupled: after = before * (1 - decay) + change
        change.sub_(after, alpha=decay).div_(1 - decay)
    return change
