"""Checks of what a run reads, trains and writes: sizes, shares, intervals, files. Files are looked for, not opened."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from megatron_ssu.config.coerce import show
from megatron_ssu.config.megatron_fields import DDP, OPTIMIZER
from megatron_ssu.config.schema import DataSource, RunConfig
from megatron_ssu.config.units import parse_size, parse_split, seconds
from megatron_ssu.errors import UserError
from megatron_ssu.methods.options import check_names
from megatron_ssu.scoring import base

_JSONL = re.compile(r".*\.(jsonl|json)(\.gz|\.zst)?")
MAX_SEED = 2**32 - 1  # numpy's


def validate_train(run: RunConfig, dp: int) -> None:
    """Check batches against `dp` data-parallel ranks, schedule, optimizer, data, shield and checkpoint settings."""
    train = run.train
    positive = ("iterations", "micro_batch_size", "global_batch_size")
    for name in positive:
        at_least(f"train.{name}", getattr(train, name), 1)
    for name in ("eval_interval", "eval_batches"):
        at_least(f"train.{name}", getattr(train, name), 0)
    at_least("train.max_skipped", train.max_skipped, 1)
    at_least("train.spike_sigma", train.spike_sigma, 0)
    at_least("train.phase.number", train.phase.number, 1)
    seconds(train.exit_after)
    validate_batches(run, dp)
    _schedule(run)
    _optimizer(run)
    _seed("train.seed", train.seed)
    _seed("data.seed", run.data.seed)
    at_least("log.interval", run.log.interval, 1)
    validate_data(run)
    validate_checkpoint(run)


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
                f"train.global_batch_size: {total} / ({micro} (micro batch) x {dp} (data)) = {count} micro-batches is "
                f"no multiple of {stages} (pipeline), which virtual pipeline stages need; "
                f"{-(-count // stages) * stages * step} would do"
            )
    elif not stages <= group <= count or 0 < count % group < stages:
        raise UserError(
            f"parallel.microbatch_group_size_per_vp_stage: {group} must be from {stages} (pipeline) to {count} (micro-"
            f"batches a step), and {count} modulo it 0 or at least {stages}; leave it out for {stages}"
        )


def _schedule(run: RunConfig) -> None:
    schedule = run.train.schedule
    if not 0 <= schedule.warmup_fraction < 1:
        raise UserError(
            f"train.schedule.warmup_fraction: {schedule.warmup_fraction} is no share of the run; it must be in [0, 1)"
        )
    if schedule.decay_style == "WSD":
        if not 0 < schedule.wsd_decay_fraction <= 1:
            raise UserError(
                f"train.schedule.wsd_decay_fraction: {schedule.wsd_decay_fraction} is no share of the "
                f"run; it must be in (0, 1]"
            )
        if schedule.warmup_fraction + schedule.wsd_decay_fraction > 1:
            raise UserError(
                f"train.schedule.wsd_decay_fraction: {schedule.warmup_fraction} (warm-up) + "
                f"{schedule.wsd_decay_fraction} (decay) is more than the whole run; lower one of them"
            )


def _optimizer(run: RunConfig) -> None:
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
            raise UserError(f"{key}.{name}: {values[name]} must be in [0, 1)")
    _placement(run)
    accepted(key, OPTIMIZER.load(), {**values, "use_distributed_optimizer": True})
    accepted("parallel.ddp", DDP.load(), {**run.parallel.ddp, "use_distributed_optimizer": True})


def _placement(run: RunConfig) -> None:
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


def validate_shield(run: RunConfig) -> None:
    """Check the shield section, and that what it will read is there."""
    shield, calibration = run.shield, run.shield.calibration
    for name in ("samples", "sequence_length", "micro_batch_size"):
        at_least(f"shield.calibration.{name}", getattr(calibration, name), 1)
    _seed("shield.seed", shield.seed)
    _seed("shield.calibration.seed", calibration.seed)
    check_names(run)
    for name in ("file", "scores"):
        given = getattr(shield, name)
        if given is not None:
            existing_file(f"shield.{name}", given, "or leave it out to have it made")
    paths = calibration.path if isinstance(calibration.path, list) else [calibration.path]
    for number, path in enumerate(p for p in paths if p is not None):
        key = "shield.calibration.path" + (f".{number}" if isinstance(calibration.path, list) else "")
        jsonl_file(key, path)
    if not calibration.path and needs_calibration(run):
        read = [name for name in (shield.score, *shield.also_score) if base.needs_calibration([name])]
        weights = [name for name in base.NAMES if not base.needs_calibration([name])]
        raise UserError(
            f"shield.calibration.path: missing; {f'score {read[0]!r}' if read else 'shield.norms half'} reads source chat "
            f"samples (JSONL); give them, or shield.file, shield.scores, or a score of the weights alone "
            f"({', '.join(weights)})"
        )


def needs_calibration(run: RunConfig) -> bool:
    """Must this run forward calibration samples to get its shield? Not when a shield or scores are there."""
    shield, made = run.shield, Path(run.checkpoint.directory)
    if shield.file or shield.scores:
        return False
    if not base.needs_calibration([shield.score, *shield.also_score]) and shield.norms != "half":
        return False
    return not any((made / name).is_file() for name in ("shield.safetensors", "scores.safetensors"))


def validate_data(run: RunConfig) -> None:
    """Check the data section, and that its files are there."""
    data = run.data
    at_least("data.sequence_length", data.sequence_length, 1)
    at_least("data.workers", data.workers, 1)
    at_least("data.loader_workers", data.loader_workers, 0)
    parse_split(data.used_split)
    if not data.text_key:
        raise UserError(
            "data.text_key: is empty; name the key of the JSONL lines that holds the text, for example text"
        )
    if not data.train:
        raise UserError("data.train: missing; name a JSONL file or the prefix of an indexed dataset, or a list of them")
    if isinstance(data.train, str):
        data_path("data.train", data.train)
    else:
        for number, part in enumerate(data.train):
            source = part if isinstance(part, DataSource) else DataSource(part)
            data_path(f"data.train.{number}", source.path)
            if not (math.isfinite(source.weight) and source.weight > 0):
                raise UserError(
                    f"data.train.{number}.weight: {source.weight} must be above 0; leave the part out instead"
                )
    for name in ("source_valid", "target_valid"):
        given = getattr(data, name)
        if isinstance(given, dict):
            for key, path in given.items():
                data_path(f"data.{name}.{key}", path)
        elif given is not None:
            data_path(f"data.{name}", given)


def validate_checkpoint(run: RunConfig) -> None:
    """Check where the run writes; nothing that is there already may be in the way."""
    checkpoint = run.checkpoint
    at_least("checkpoint.interval", checkpoint.interval, 0)
    if checkpoint.keep is not None:
        at_least("checkpoint.keep", checkpoint.keep, 1)
    parse_size(checkpoint.max_shard_size)
    if not checkpoint.directory:
        raise UserError("checkpoint.directory: is empty; name the folder that this run may write to")
    for key, written in (("checkpoint.directory", checkpoint.directory), ("checkpoint.export", checkpoint.export)):
        if written is None:
            continue
        if Path(written).exists() and not Path(written).is_dir():
            raise UserError(f"{key}: {written} is a file; name a folder")
        if Path(written).resolve() == Path(run.model.path).resolve():
            raise UserError(f"{key}: {written} is model.path, which stays as it is; name another folder")


def _seed(key: str, seed: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"{key}: {seed} is no seed; choose one from 0 to {MAX_SEED}")


def at_least(key: str, value: float, least: int) -> None:
    """Refuse a `value` below `least` (or NaN)."""
    if not value >= least:
        raise UserError(f"{key}: {value} is too small; it must be at least {least}")


def data_path(key: str, path: str) -> None:
    """Refuse a `path` that is neither a JSONL file nor the prefix of an indexed dataset."""
    if _JSONL.fullmatch(path):
        return existing_file(key, path)
    parts = [Path(f"{path}.bin"), Path(f"{path}.idx")]
    missing = [part for part in parts if not part.is_file()]
    if not missing:
        return None
    if len(missing) == 1:
        raise UserError(f"{key}: {missing[0]} is missing beside {(set(parts) - set(missing)).pop()}; run prepare again")
    prefix, suffix = path[:-4], path[-4:]
    if suffix in (".bin", ".idx"):
        raise UserError(f"{key}: {path} is one file of an indexed dataset; write its prefix: {prefix}")
    raise UserError(
        f"{key}: {show(path)} is neither a JSONL file (.jsonl or .json, also .gz or .zst) nor the prefix of an indexed "
        f"dataset (no {path}.bin and {path}.idx){_hint(path)}"
    )


def jsonl_file(key: str, path: str) -> None:
    """Refuse a `path` that is no JSONL file by name, or is not there."""
    if not _JSONL.fullmatch(path):
        raise UserError(
            f"{key}: {show(path)} is not named as JSONL (.jsonl or .json, also .gz or .zst); rename or convert it"
        )
    existing_file(key, path)


def existing_file(key: str, path: str, advice: str = "") -> None:
    """Refuse a `path` at which there is no file."""
    if Path(path).is_dir():
        raise UserError(f"{key}: {path} is a directory; name a file in it")
    if not Path(path).is_file():
        raise UserError(f"{key}: {show(path)} does not exist; correct it{advice and ', ' + advice}{_hint(path)}")


def _hint(path: str) -> str:
    if path.startswith("~") or "$" in path:
        return "; ~ and variables are not expanded, write the whole path"
    return "" if Path(path).is_absolute() else f"; relative paths start at {Path.cwd()}"
