"""The trainers that step.py compares: full fine-tuning on stock megatron-core, and this project's under random shields."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from megatron_ssu.config.schema import (
    CheckpointSection,
    DataSection,
    ModelSection,
    PrecisionSection,
    RunConfig,
    TrainSection,
)
from megatron_ssu.engine.device import has_cuda
from megatron_ssu.engine.optimizer import members, state_bytes
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.parallel_model import open_model, open_source
from megatron_ssu.shield.mask import Mask
from megatron_ssu.shield.shield_file import Shield
from megatron_ssu.train.trainer import Step, Trainer, current_lr, mean_loss

STOCK, UNFUSED = "stock", "stock, unfused"
VARIANTS = (STOCK, UNFUSED, "SSU 0.0", "SSU 0.25", "SSU 0.5", "SSU 0.75", "row 0.5")
FUSED_MODEL = ("bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion")
FUSED_PARALLEL = ("cross_entropy_loss_fusion", "gradient_accumulation_fusion")


@dataclass(frozen=True)
class Variant:
    """What a variant's name says: 'stock', 'stock, unfused', or a shield such as 'SSU 0.5', 'row 0.5', 'element 0.5'."""

    stock: bool
    fused_adam: bool = True
    granularity: Literal["column", "row", "element"] = "column"
    ratio: float = 0.0  # frozen fraction of every linear weight

    @classmethod
    def named(cls, name: str) -> Variant:
        """Raises ValueError for a name that is none."""
        if name in (STOCK, UNFUSED):
            return cls(True, name == STOCK)
        found = re.fullmatch(r"(SSU|column|row|element) (0(?:\.\d+)?|1(?:\.0+)?)", name)
        if not found:
            raise ValueError(
                f"a variant must be {STOCK!r}, {UNFUSED!r} or such as 'SSU 0.5' or 'row 0.5', got {name!r}"
            )
        granularity: Any = "column" if found[1] == "SSU" else found[1]
        return cls(False, True, granularity, float(found[2]))


def chosen(names: list[str] | None) -> list[str]:
    """The variants to measure, stock always and first; without being asked for, the unfused one on a CPU alone."""
    names = names or [name for name in VARIANTS if not (has_cuda() and name == UNFUSED)]
    for name in names:
        Variant.named(name)
    return [STOCK, *(name for name in names if name != STOCK)]


class StockTrainer(Trainer):
    """Full fine-tuning with the steps of megatron's own training loop: `optimizer.step()` takes the norm, clips, updates."""

    def step(self, batches: Any, votes: Callable[[], Sequence[float]] = tuple, *, measure: bool = False) -> Step:
        """One step; neither votes nor update norms."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        reports = self._schedule(batches, self.micro_batches, forward_only=False)
        loss, lr = mean_loss(reports)[0], current_lr(self.optimizer)
        with self.times("optimizer"):
            done, norm, _ = self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step(increment=1)
        return Step(loss, float(norm), lr, skipped=not done)


def build(options: argparse.Namespace, model: Path, name: str) -> Trainer:
    """The trainer of a variant."""
    variant = Variant.named(name)
    precision = {"fp8": options.fp8, "fp8_recipe": options.fp8_recipe} if options.fp8 else {}
    run = RunConfig(
        model=ModelSection(path=str(model)),
        checkpoint=CheckpointSection(directory="unused"),
        precision=PrecisionSection(dtype=options.dtype, transformer=precision),
        data=DataSection(sequence_length=options.length),
        train=TrainSection(
            iterations=10**6,
            micro_batch_size=options.micro_batch,
            global_batch_size=options.batch,
            fused_adam=variant.fused_adam,
        ),
    )
    if not options.fused:
        run.model.transformer.update(dict.fromkeys(FUSED_MODEL, False))
        run.parallel.transformer.update(dict.fromkeys(FUSED_PARALLEL, False))
    trainer = StockTrainer if variant.stock else Trainer
    return trainer(open_model(run), random_shield(model, variant))


def random_shield(model: Path, variant: Variant) -> Shield:
    """Random columns, rows or elements of every linear weight."""
    source, draw = open_source(model), np.random.default_rng(0)
    matrices = {m.name: m for m in source.family.linear_matrices(source.dims)} if variant.ratio else {}
    masks = {}
    for name, matrix in matrices.items():
        units = {"column": matrix.shape[1], "row": matrix.shape[0], "element": matrix.elements}[variant.granularity]
        frozen = np.zeros(units, dtype=bool)
        frozen[draw.permutation(units)[: int(variant.ratio * units)]] = True
        masks[name] = Mask.of(variant.granularity, matrix.shape, frozen)
    return Shield(
        "ssu",
        source.name,
        model_fingerprint(model),
        matrices=matrices,
        masks=masks,
        granularity=variant.granularity,
    )


def make_model(options: argparse.Namespace, directory: Path) -> Path:
    """A random OLMo-2 or Qwen3-MoE of the asked size."""
    import transformers

    ffn = options.ffn or int(2.75 * options.hidden)
    sizes = {
        "hidden_size": options.hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.heads,
        "vocab_size": options.vocab,
        "max_position_embeddings": options.length,
    }
    experts = {"num_experts": options.experts, "num_experts_per_tok": options.active, "moe_intermediate_size": ffn}
    config = (
        transformers.Qwen3MoeConfig(**sizes, **experts, head_dim=options.hidden // options.heads, norm_topk_prob=True)
        if options.experts
        else transformers.Olmo2Config(**sizes)
    )
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    model.to(dtype).save_pretrained(directory)
    return directory


def batches(options: argparse.Namespace) -> Iterator[dict[str, torch.Tensor]]:
    """The same random sequences for ever."""
    size = (options.micro_batch, options.length + 1)
    stream = torch.randint(0, options.vocab, size, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(options.micro_batch, options.length)
    positions = torch.arange(options.length).expand(options.micro_batch, -1)
    while True:
        yield {"tokens": stream[:, :-1], "labels": stream[:, 1:], "loss_mask": ones, "position_ids": positions}


def exchanged_bytes(trainer: Trainer) -> int:
    """Bytes that a step reduces of gradients and gathers of parameters: DDP's buffers, at data parallel 1 too."""
    buffers = [b for chunk in trainer.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return sum(b.grad_data.nbytes + b.param_data.nbytes for b in buffers)


def model_state(trainer: Trainer) -> int:
    """Bytes of weights, compact parameters, gradient buffers, main weights and moments.

    A main weight that is the parameter itself, as in fp32, counts once.
    """
    params = {p for chunk in trainer.session.chunks for p in chunk.parameters()}
    total = state_bytes(trainer.optimizer) + sum(p.nbytes for p in params)
    total += sum(b.grad_data.nbytes for chunk in trainer.chunks for b in chunk.buffers)
    storages = {p.untyped_storage().data_ptr() for p in params}
    for member in members(trainer.optimizer):
        for group in member.optimizer.param_groups:
            total -= sum(p.nbytes for p in group["params"] if p.untyped_storage().data_ptr() in storages)
    return total
