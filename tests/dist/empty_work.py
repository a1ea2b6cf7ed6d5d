"""What ranks do for test_empty_shards.py: training under multi-tensor kernels that do not take empty tensors."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import torch
from megatron.core.optimizer import clip_grads

from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.session import open_session, open_source
from megatron_ssu.shield import optimizer
from megatron_ssu.shield.file import Mask, Shield
from tests.dist import work

_STOCK = clip_grads.multi_tensor_applier


def frozen_shield(model: str, *, everything: bool = False) -> Shield:
    """Half of every linear weight's columns, all of layer 1, of the MLP of layer 0 and of the last layer's down projection; or
    `everything` that there is."""
    source, draw = open_source(model), np.random.default_rng(0)
    masks = {}
    for matrix in source.family.matrices(source.dims):
        whole = any(part in matrix.name for part in ("layers.1.", "layers.0.mlp", "layers.3.mlp.down_proj"))
        kind: Any = "element" if len(matrix.shape) == 1 else "column"
        if everything or (whole and matrix.scored):
            masks[matrix.name] = Mask.constant(kind, matrix.shape, True)
        elif matrix.scored:
            masks[matrix.name] = Mask.of("column", matrix.shape, draw.random(matrix.shape[1]) < 0.5)
    matrices = {m.name: m for m in source.family.matrices(source.dims) if m.name in masks}
    return Shield("ssu", source.name, model_fingerprint(model), matrices=matrices, masks=masks)


def strict_applier(op: Any, overflow: Any, tensors: list[list[torch.Tensor]], *args: Any) -> Any:
    """As in Transformer Engine, but it does not drop empty tensors in silence."""
    assert all(t.numel() for group in tensors for t in group), "a kernel was given an empty tensor"
    return _STOCK(op, overflow, tensors, *args)


def train(model: str, shield_file: str, steps: int, *, strict: bool, **options: Any) -> list[tuple]:
    """Loss, gradient norm and learning rate by step; `strict`: as where Transformer Engine or Apex is."""
    with (
        mock.patch.object(optimizer, "HAVE_APEX_OR_TE", strict),
        mock.patch.object(clip_grads, "multi_tensor_applier", strict_applier if strict else _STOCK),
    ):
        return work.train_steps(model, work.mesh(), steps, shield_file=shield_file, **options)["history"]


def gradients_after_a_step(model: str, shield_file: str) -> tuple[int, int]:
    """How many main weights there are, and how many of them still have a gradient after the step."""
    from megatron_ssu.shield.file import load_shield
    from megatron_ssu.train import loop

    run = work.run_config(model, work.mesh())
    run.data.sequence_length, run.data.loader_workers, run.train.global_batch_size = work.LENGTH, 0, 2
    trainer = loop.Trainer(open_session(run), load_shield(shield_file))
    trainer.step(trainer.batches(work.RandomTokens(), 0))
    mains = [main for member in trainer.optimizer.chained_optimizers for _, main in member.pairs()]
    return len(mains), sum(main.grad is not None for main in mains)
