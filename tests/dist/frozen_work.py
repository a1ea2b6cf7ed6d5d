"""What ranks do for test_wholly_frozen.py: shields that leave nothing of some weights, and training under them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from megatron.core.optimizer import clip_grads

from megatron_ssu.engine.optimizer import members
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.matrix import Matrix
from megatron_ssu.models.parallel_model import open_model, open_source
from megatron_ssu.shield.mask import Mask
from megatron_ssu.shield.shield_file import Shield, load_shield
from megatron_ssu.train.trainer import Trainer
from tests.dist import work

_STOCK = clip_grads.multi_tensor_applier


def shield_of(model: str, mask: Callable[[Matrix], Mask | None]) -> Shield:
    source = open_source(model)
    matrices = {m.name: m for m in source.family.matrices(source.dims)}
    masks = {name: found for name, m in matrices.items() if (found := mask(m)) is not None}
    matrices = {name: matrices[name] for name in masks}
    return Shield("ssu", source.name, model_fingerprint(model), matrices=matrices, masks=masks)


def frozen_shield(model: str, pattern: str) -> Shield:
    """All of every matrix whose name has `pattern`, and half of the other linear weights' columns."""
    draw = np.random.default_rng(0)

    def mask(matrix: Matrix) -> Mask | None:
        if re.search(pattern, matrix.name):
            return Mask.constant("element" if len(matrix.shape) == 1 else "column", matrix.shape, True)
        return Mask.of("column", matrix.shape, draw.random(matrix.shape[1]) < 0.5) if matrix.scored else None

    return shield_of(model, mask)


def one_rank_shield(model: str) -> Shield:
    """What trains is the first half of every linear weight and some rows of embedding and head: those of the first of two
    tensor-parallel ranks."""

    def mask(matrix: Matrix) -> Mask:
        if len(matrix.shape) == 1:
            return Mask.constant("element", matrix.shape, True)
        kind: Any = "column" if matrix.kind in ("o_proj", "down_proj") else "row"
        units = matrix.shape[1 if kind == "column" else 0]
        return Mask.of(kind, matrix.shape, np.arange(units) >= units // 2)

    return shield_of(model, mask)


def strict_applier(op: Any, overflow: Any, tensors: list[list[torch.Tensor]], *args: Any) -> Any:
    """As in Transformer Engine, but it does not drop empty tensors in silence."""
    assert all(t.numel() for group in tensors for t in group), "a kernel was given an empty tensor"
    return _STOCK(op, overflow, tensors, *args)


def train(model: str, parallel: dict[str, Any], shield_file: str, steps: int, **options: Any) -> dict[str, Any]:
    """As `work.train_steps`, under multi-tensor kernels that do not take empty tensors."""
    with mock.patch.object(clip_grads, "multi_tensor_applier", strict_applier):
        return work.train_steps(model, parallel, steps, shield_file=shield_file, **options)


def after_a_step(model: str, shield_file: str) -> dict[str, Any]:
    """Names of parameters that ask for a gradient, of those in DDP's buffers, main weights' sizes, and main weights that still
    have a gradient after a step."""
    run = work.run_config(model, work.mesh())
    run.data.sequence_length, run.data.loader_workers, run.train.global_batch_size = work.LENGTH, 0, 2
    session = open_model(run)
    trainer = Trainer(session, load_shield(shield_file))
    trainer.step(trainer.batches(work.RandomTokens(), 0))
    mains = [p for member in members(trainer.optimizer) for group in member.param_groups for p in group["params"]]
    buffered = {p for chunk in trainer.chunks for buffer in chunk.buffers for p in buffer.params}
    named = dict(session.chunks[0].named_parameters())
    return {
        "asking": {name for name, p in named.items() if p.requires_grad},
        "buffered": {name for name, p in named.items() if p in buffered},
        "mains": [main.numel() for main in mains],
        "left": sum(main.grad is not None for main in mains),
    }
