"""What the ranks of the estimate's test do: build a trainer, take a step, count tensor bytes."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_ssu.config.schema import DataSection, RunConfig, TrainSection
from megatron_ssu.engine.optimizer import members, state_bytes
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.parallel_model import open_model
from megatron_ssu.shield.shield_file import Shield, load_shield
from megatron_ssu.train.trainer import Trainer
from tests.dist.work import RandomTokens, run_config


def make_run(model: str, parallel: dict[str, Any], dtype: str, transformer: dict[str, Any], length: int) -> RunConfig:
    run = run_config(
        model,
        parallel,
        dtype,
        data=DataSection(sequence_length=length, loader_workers=0),
        train=TrainSection(iterations=10, micro_batch_size=2, global_batch_size=16),
    )
    run.model.transformer.update(transformer)
    return run


def state(run: RunConfig, shield_file: str | None) -> dict[str, int]:
    """Bytes of weights, gradient buffers, gradient copies and what the optimizer holds beside the weights."""
    session = open_model(run)
    none = Shield("none", "m", model_fingerprint(run.model.path), matrices={}, masks={})
    trainer = Trainer(session, load_shield(shield_file) if shield_file else none)
    weights = [p for chunk in session.chunks for p in chunk.parameters()]
    buffers = [b.grad_data for chunk in trainer.chunks for b in chunk.buffers + chunk.expert_parallel_buffers]
    for member in members(trainer.optimizer):
        member._init_optimizer_states_with_dummy_values()
        member._copy_model_grads_to_main_grads()
    mains = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    held = {t.untyped_storage().data_ptr() for t in [*weights, *buffers]}
    copies = [p.grad for p in mains if p.grad is not None and p.grad.untyped_storage().data_ptr() not in held]
    views = [p for p in mains if p.untyped_storage().data_ptr() in held]
    return {
        "weights": sum(p.nbytes for p in weights),
        "gradients": sum(b.nbytes for b in buffers),
        "optimizer": state_bytes(trainer.optimizer) - sum(p.nbytes for p in views),
        "gradient_copies": sum(g.nbytes for g in copies),
        "parameters": sum(p.numel() for p in weights),
    }


class _Saved:
    """Bytes of the tensors that autograd keeps, weights left out, each storage once."""

    def __init__(self, weights: list[torch.nn.Parameter]) -> None:
        self._weights = {p.untyped_storage().data_ptr() for p in weights}
        self._kept: dict[int, torch.Tensor] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.untyped_storage().data_ptr()
        if key not in self._weights:
            self._kept[key] = tensor  # held, so that its place is not used again
        return tensor

    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self._kept.values())


def activations(run: RunConfig) -> int:
    """Bytes kept for the backward pass of one micro-batch through this rank's chunks, forward alone."""
    session = open_model(run)
    data, size = RandomTokens(), run.train.micro_batch_size
    length = run.data.sequence_length
    tokens = torch.stack([data[0]["tokens"].repeat(-(-length // 16))[:length] for _ in range(size)])
    positions = torch.arange(length).expand(size, -1)
    saved = _Saved([p for chunk in session.chunks for p in chunk.parameters()])

    def forward_step(iterator: Any, chunk: torch.nn.Module) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            output = chunk(tokens, positions, None, labels=tokens)
        return output, lambda loss: (loss.float().mean(), {})

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[None] * session.mesh.chunks,
        model=session.chunks if session.mesh.virtual else session.chunks[0],
        num_microbatches=1,
        seq_length=length,
        micro_batch_size=size,
        forward_only=False,
    )
    return saved.bytes()
