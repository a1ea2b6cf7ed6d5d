"""Checks of the section `train`, but for its optimizer: steps, batches, schedule."""

from __future__ import annotations

import math

from megatron_ssu.config.checks.checkpoint import validate_checkpoint
from megatron_ssu.config.checks.data import validate_data
from megatron_ssu.config.checks.optimizer import validate_optimizer
from megatron_ssu.config.checks.values import at_least, seed_in_range
from megatron_ssu.config.schema import RunConfig
from megatron_ssu.config.units import seconds
from megatron_ssu.errors import UserError


def validate_train(run: RunConfig, dp: int) -> None:
    """Check batches against `dp` data-parallel ranks, schedule, optimizer, data, shield and checkpoint settings."""
    train = run.train
    for name in ("micro_batch_size", "global_batch_size"):
        at_least(f"train.{name}", getattr(train, name), 1)
    if train.epochs is None:
        at_least("train.iterations", train.iterations, 1)
    for name in ("eval_interval", "eval_batches"):
        at_least(f"train.{name}", getattr(train, name), 0)
    at_least("train.max_skipped", train.max_skipped, 1)
    at_least("train.spike_sigma", train.spike_sigma, 0)
    seconds(train.exit_after)
    validate_batches(run, dp)
    _schedule(run)
    validate_optimizer(run)
    validate_regularize(run)
    seed_in_range("train.seed", train.seed)
    seed_in_range("data.seed", run.data.seed)
    at_least("log.interval", run.log.interval, 1)
    validate_data(run)
    validate_checkpoint(run)


def validate_regularize(run: RunConfig) -> None:
    """Check the coefficients of train.regularize."""
    section, key = run.train.regularize, "train.regularize"
    for name in ("l2", "kl"):
        value = getattr(section, name)
        if not 0 <= value < math.inf:
            raise UserError(f"{key}.{name}: must be a finite number of at least 0, got {value}; 0 leaves it out")
    if not 0 < section.kl_temperature < math.inf:
        raise UserError(
            f"{key}.kl_temperature: must be a finite number above 0, got {section.kl_temperature}; 1 is the models' own"
        )


def validate_batches(run: RunConfig, dp: int) -> None:
    """Micro, global batch and virtual stages against `dp` data-parallel ranks."""
    micro, total = run.train.micro_batch_size, run.train.global_batch_size
    step = micro * dp
    if total % step:
        below, above = total // step * step, -(-total // step) * step
        would_do = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"train.global_batch_size: {micro} (micro batch) x {dp} (data) = {step} does not divide {total} (global "
            f"batch); {would_do} would do"
        )
    if run.parallel.virtual_pipeline is None:
        return
    stages, count = run.parallel.pipeline, total // step
    group = run.parallel.transformer.get("microbatch_group_size_per_vp_stage")
    if group is None:
        if count % stages:
            raise UserError(
                f"train.global_batch_size: {total} / ({micro} (micro batch) x {dp} (data)) = {count} micro-batches "
                f"must be a multiple of {stages} (pipeline) with virtual pipeline stages; "
                f"{-(-count // stages) * stages * step} would do"
            )
    elif not stages <= group <= count or 0 < count % group < stages:
        raise UserError(
            f"parallel.microbatch_group_size_per_vp_stage: {group} must be from {stages} (pipeline) to {count} (micro-"
            f"batches per step), and {count} modulo it 0 or at least {stages}; leave it out for {stages}"
        )


def _schedule(run: RunConfig) -> None:
    schedule = run.train.schedule
    if not 0 <= schedule.warmup_fraction < 1:
        raise UserError(f"train.schedule.warmup_fraction: must be in [0, 1), got {schedule.warmup_fraction}")
    if schedule.decay_style == "WSD":
        if not 0 < schedule.wsd_decay_fraction <= 1:
            raise UserError(f"train.schedule.wsd_decay_fraction: must be in (0, 1], got {schedule.wsd_decay_fraction}")
        if schedule.warmup_fraction + schedule.wsd_decay_fraction > 1:
            raise UserError(
                f"train.schedule.wsd_decay_fraction: {schedule.warmup_fraction} (warm-up) + "
                f"{schedule.wsd_decay_fraction} (decay) is more than the whole run; lower one of them"
            )
