"""Checks of `train.optimizer` and `parallel.ddp`."""

from __future__ import annotations

from typing import Any

from megatron_ssu.config.checks.values import at_least
from megatron_ssu.config.megatron_fields import DDP, OPTIMIZER
from megatron_ssu.config.schema import RunConfig
from megatron_ssu.errors import UserError


def validate_optimizer(run: RunConfig) -> None:
    values = run.train.optimizer
    key = "train.optimizer"
    for name in ("lr", "min_lr", "decoupled_lr", "decoupled_min_lr", "weight_decay", "clip_grad", "adam_eps"):
        if values.get(name) is not None:
            at_least(f"{key}.{name}", values[name], 0)
    lr, min_lr = values.get("lr"), values.get("min_lr")
    if lr is None:
        raise UserError(f"{key}.lr: missing; write the peak learning rate, for example 5e-5")
    if min_lr is None:
        raise UserError(f"{key}.min_lr: must be a number, got null; write 0, or leave the key out")
    if min_lr > lr:
        raise UserError(f"{key}.min_lr: {min_lr} is above lr {lr}; lower it or raise {key}.lr")
    _decoupled_rates(key, values, min_lr)
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= values.get(name, 0.9) < 1:
            raise UserError(f"{key}.{name}: must be in [0, 1), got {values[name]}")
    validate_placement(run)
    accepted(key, OPTIMIZER.load(), {**values, "use_distributed_optimizer": True})
    accepted("parallel.ddp", DDP.load(), {**run.parallel.ddp, "use_distributed_optimizer": True})


def validate_placement(run: RunConfig) -> None:
    """What megatron-core's optimizers need where they keep their state elsewhere, or gather weights early."""
    values, key = run.train.optimizer, "train.optimizer"
    if values.get("optimizer_cpu_offload"):
        if run.precision.dtype != "bf16":
            raise UserError(
                f"{key}.optimizer_cpu_offload: needs precision.dtype: bf16, not {run.precision.dtype}, whose weights "
                "are their own main weights; leave it out"
            )
        if not values.get("use_precision_aware_optimizer"):
            raise UserError(
                f"{key}.optimizer_cpu_offload: needs {key}.use_precision_aware_optimizer: true, by which megatron-core "
                "saves and loads its state; set it"
            )
        if values.get("decoupled_weight_decay") is False:
            raise UserError(f"{key}.optimizer_cpu_offload: needs decoupled_weight_decay: true; leave one of them out")
    if values.get("store_param_remainders"):  # megatron's default, and so no setting of its own elsewhere
        raise UserError(
            f"{key}.store_param_remainders: true: checkpoints hold whole main weights, of which this keeps the lower halves; "
            "leave it out"
        )
    early = "overlap_param_gather_with_optimizer_step"
    if values.get(early) and not (run.parallel.virtual_pipeline and run.parallel.ddp.get("overlap_param_gather")):
        raise UserError(
            f"{key}.{early}: needs virtual pipeline stages and parallel.ddp.overlap_param_gather; set both, or leave it out"
        )


def _decoupled_rates(key: str, values: dict[str, Any], min_lr: float) -> None:
    """Embedding and head may have a learning rate of their own."""
    peak, least = values.get("decoupled_lr"), values.get("decoupled_min_lr")
    if peak is None and least is not None:
        raise UserError(
            f"{key}.decoupled_min_lr: {least} has no effect without decoupled_lr; give that, or leave it out"
        )
    least_key, least = ("min_lr", min_lr) if least is None else ("decoupled_min_lr", least)
    if peak is not None and least > peak:
        raise UserError(f"{key}.decoupled_lr: {peak} is below {least_key} {least}; raise it or lower {key}.{least_key}")


def accepted(key: str, cls: type, values: dict[str, Any]) -> None:
    """Refuse what megatron-core's dataclass `cls` itself refuses."""
    try:
        cls(**values)
    except (AssertionError, ValueError, RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split()) or "these settings do not go together"
        raise UserError(f"{key}: megatron-core refuses: {reason}") from error
