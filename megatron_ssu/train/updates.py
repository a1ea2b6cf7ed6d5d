"""How far a step moved the trainable weights, by kind of matrix."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

from megatron_ssu import runtime
from megatron_ssu.models.layout import Layout
from megatron_ssu.models.matrix import KINDS

_JOINED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
_JOINED |= {"up_proj": "gate_up_proj"}
NAMES = tuple(dict.fromkeys(_JOINED.get(kind, kind) for kind in KINDS))


def update_norms(optimizer: MegatronOptimizer, layout: Layout) -> dict[str, float]:
    """L2 norm of the last step's change of the trainable fp32 weights by kind; collective, between step and schedule.

    Computed from Adam's moments, one parameter at a time, so nothing is copied before the step. Matrices that megatron
    fuses (q, k, v; gate, up) are one kind.
    """
    kinds = {local.param: _kind(local.pieces) for local in layout}
    squares = torch.zeros(len(NAMES), dtype=torch.float64, device=runtime.device())
    for member in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(member, "is_stub_optimizer", False):
            continue
        for model_param, main in member.pairs():
            if getattr(model_param, "shared", False) or not param_is_not_tensor_parallel_duplicate(model_param):
                continue
            index, order = member.model_param_group_index_map[model_param]
            group = member.optimizer.param_groups[index]
            state = member.optimizer.state.get(group["params"][order], {})
            if "exp_avg" in state and main.numel():
                change = _adam_change(main.detach(), state, group, member.config.decoupled_weight_decay)
                squares[NAMES.index(kinds[model_param])] += change.double().square().sum()
    dist.all_reduce(squares)
    return {f"update_norm_{name}": value for name, value in zip(NAMES, squares.sqrt().tolist()) if value > 0}


def _kind(pieces: Any) -> str:
    kind = pieces[0].matrix.kind
    return _JOINED.get(kind, kind)


def _adam_change(main: torch.Tensor, state: dict[str, Any], group: dict[str, Any], decoupled: bool) -> torch.Tensor:
    """What Adam added to `main` (its value after the step) in the last step."""
    step, (beta1, beta2), lr = float(state.get("step", group.get("step", 1))), group["betas"], group["lr"]
    mean = state["exp_avg"].float() / (1 - beta1**step)
    spread = (state["exp_avg_sq"].float() / (1 - beta2**step)).sqrt_().add_(group["eps"])
    change = mean.div_(spread).mul_(-lr)
    decay = lr * group["weight_decay"] if decoupled else 0.0
    if decay:  # decoupled: after = before * (1 - decay) + change
        before = (main - change).div_(1 - decay)
        change = main - before
    return change
