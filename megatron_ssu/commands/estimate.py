"""Estimate memory, compute and time of a run."""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from megatron_ssu.config.schema import RunConfig
from megatron_ssu.errors import UserError
from megatron_ssu.io.atomic import check_writable, write_text
from megatron_ssu.methods.planned import shield_path
from megatron_ssu.methods.registry import method_of
from megatron_ssu.models.hf_config import read_hf_config
from megatron_ssu.shield.shield_file import load_shield


def run(run_file: RunConfig, options: argparse.Namespace, console: Console) -> int:
    estimate(run_file, options, console)
    return 0


def estimate(run: RunConfig, options: argparse.Namespace, console: Console) -> None:
    """Print memory, work and time of a run on options.world_size ranks; with options.json write them as JSON."""
    from megatron_ssu.estimate.estimate import estimate as count
    from megatron_ssu.estimate.estimate import smallest_world
    from megatron_ssu.estimate.hardware import gpu_named
    from megatron_ssu.estimate.report import render, to_dict

    gpu = gpu_named(options.gpu) if options.gpu else None
    target = check_writable(options.json) if options.json else None
    if not 0 < options.efficiency <= 1:
        raise UserError(f"--efficiency: {options.efficiency} must be above 0 and at most 1; 0.6 is usual")
    world = smallest_world(run) if options.world_size is None else options.world_size
    if world < 1:
        raise UserError(f"--world-size: {world} must be 1 or more")
    hf = read_hf_config(run.model.path)
    path = shield_path(run)
    method = method_of(run)
    shield = load_shield(path) if method.shields and not method.adapts and path.exists() else None
    if shield is not None:
        method.check_counted(run, shield)
        console.print(f"as {path} freezes it", highlight=False, soft_wrap=True)
    found = count(run, hf, world, shield=shield, engine=not options.local_layers)
    render(found, gpu, console, options.efficiency)
    if target is not None:
        write_text(target, json.dumps(to_dict(found, gpu, options.efficiency), indent=1) + "\n")
