"""How far a step moved the trainable weights, by kind of matrix."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

from megatron_ssu.engine.device import local_device
from megatron_ssu.models.layout import Layout
from megatron_ssu.models.matrix import KINDS

_JOINED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
_JOINED |= {"up_proj": "gate_up_proj"}
CHUNK = 1 << 23  # elements; temporaries take some 20 bytes for each
NAMES = tuple(dict.fromkeys(_JOINED.get(kind, kind) for kind in KINDS))


def update_norms(optimizer: MegatronOptimizer, layout: Layout) -> dict[str, float]:
    """L2 norm of the last step's change of the trainable fp32 weights by kind; collective, between step and schedule.

    Computed from Adam's moments, CHUNK elements at a time, so nothing is copied before the step and no temporary is as
    large as a shard. Matrices that megatron fuses (q, k, v; gate, up) are one kind.
    """
    # A tensor-parallel rank may hold nothing but the padding of embedding and head, which is of no matrix.
    kinds = {local.param: _kind(local.pieces) for local in layout if local.pieces}
    squares = torch.zeros(len(NAMES), dtype=torch.float64, device=local_device())
    for member in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(member, "is_stub_optimizer", False):
            continue
        for model_param, main in member.pairs():
            if model_param not in kinds or getattr(model_param, "shared", False):
                continue
            if not param_is_not_tensor_parallel_duplicate(model_param):
                continue
            index, order = member.model_param_group_index_map[model_param]
            group = member.optimizer.param_groups[index]
            state = member.optimizer.state.get(group["params"][order], {})
            if "exp_avg" in state and main.numel():
                decoupled = member.config.decoupled_weight_decay
                squares[NAMES.index(kinds[model_param])] += change_square(main.detach(), state, group, decoupled)
    dist.all_reduce(squares)
    return {f"update_norm_{name}": value for name, value in zip(NAMES, squares.sqrt().tolist()) if value > 0}


def _kind(pieces: Any) -> str:
    kind = pieces[0].matrix.kind
    return _JOINED.get(kind, kind)


def change_square(main: torch.Tensor, state: dict[str, Any], group: dict[str, Any], decoupled: bool) -> torch.Tensor:
    """float64 []: the sum of squares of what Adam added to `main` (its value after the step) in the last step."""
    step = float(state.get("step", group.get("step", 1)))
    parts = (t.reshape(-1).split(CHUNK) for t in (main, state["exp_avg"], state["exp_avg_sq"]))
    total = torch.zeros((), dtype=torch.float64, device=main.device)
    for after, mean, square in zip(*parts, strict=True):
        change = _adam_change(after, mean, square, step, group, decoupled)
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
