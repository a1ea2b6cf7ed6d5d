"""Learning rate and weight decay over the run: megatron's OptimizerParamScheduler, in iterations."""

from __future__ import annotations

import math

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ssu.config.schema import RunConfig


def build_schedule(run: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Warm-up from 0 to train.optimizer.lr, then the decay style down to min_lr at the last iteration.

    The steps of warm-up are rounded up, as Hugging Face's Trainer does, but leave one step to decay.
    """
    settings, schedule = run.train.optimizer, run.train.schedule
    iterations = max(1, run.train.iterations)
    decay = settings["weight_decay"]
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings["lr"],
        min_lr=settings["min_lr"],
        lr_warmup_steps=min(math.ceil(schedule.warmup_fraction * iterations), iterations - 1),
        lr_decay_steps=iterations,
        lr_decay_style=schedule.decay_style,
        start_wd=decay,
        end_wd=decay,
        wd_incr_steps=iterations,
        wd_incr_style="constant",
        wsd_decay_steps=max(1, round(schedule.wsd_decay_fraction * iterations))
        if schedule.decay_style == "WSD"
        else None,
        lr_wsd_decay_style=schedule.wsd_decay_style if schedule.decay_style == "WSD" else None,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
