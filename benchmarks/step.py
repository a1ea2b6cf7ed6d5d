"""A training step under shields of several ratios against full fine-tuning on stock megatron-core, in one process.

python benchmarks/step.py [--layers 2] [--hidden 1024] [--dtype bf16] [--rounds 9] [--json FILE]

Stock is megatron's own DistributedOptimizer and linear layers in the same loop. All variants take a step in turn; a figure is
the median over the rounds, its ratio that of the rounds' own ratios to stock.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import show, write_json
from megatron.core.optimizer import get_megatron_optimizer
from rich.console import Console

from megatron_ssu import runtime
from megatron_ssu.config.schema import (
    CheckpointSection,
    DataSection,
    ModelSection,
    PrecisionSection,
    RunConfig,
    TrainSection,
)
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.session import open_session, open_source
from megatron_ssu.shield.file import Mask, Shield
from megatron_ssu.shield.optimizer import state_bytes
from megatron_ssu.train import loop

RATIOS = (0.0, 0.25, 0.5, 0.75)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ffn", type=int, help="default 2.75 x hidden")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--length", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step, one a micro-batch")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, make_model(options, Path(folder) / "model"))
    title = f"One step, {options.dtype}, hidden {options.hidden}, {options.layers} layers"
    show(Console(width=150), title, list(rows[0]), [list(row.values()) for row in rows])
    if options.json:
        write_json(options.json, {k: v for k, v in vars(options).items() if k != "json"}, rows)


def make_model(options: argparse.Namespace, directory: Path) -> Path:
    """A random OLMo-2 of the asked size."""
    import transformers

    config = transformers.Olmo2Config(
        hidden_size=options.hidden,
        intermediate_size=options.ffn or int(2.75 * options.hidden),
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        vocab_size=options.vocab,
        max_position_embeddings=options.length,
    )
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    transformers.Olmo2ForCausalLM(config).to(dtype).save_pretrained(directory)
    return directory


def random_shield(model: Path, ratio: float) -> Shield:
    """Random columns of every linear weight."""
    source, draw = open_source(model), np.random.default_rng(0)
    matrices = {m.name: m for m in source.family.linear_matrices(source.dims)} if ratio else {}
    masks = {}
    for name, matrix in matrices.items():
        frozen = np.zeros(matrix.shape[1], dtype=bool)
        frozen[draw.permutation(matrix.shape[1])[: int(ratio * matrix.shape[1])]] = True
        masks[name] = Mask.of("column", matrix.shape, frozen)
    return Shield("ssu", source.name, model_fingerprint(model), matrices=matrices, masks=masks)


def batches(options: argparse.Namespace) -> Iterator[dict[str, torch.Tensor]]:
    """The same random sequence for ever."""
    stream = torch.randint(0, options.vocab, (1, options.length + 1), generator=torch.Generator().manual_seed(0))
    ones = torch.ones(1, options.length)
    positions = torch.arange(options.length)[None]
    while True:
        yield {"tokens": stream[:, :-1], "labels": stream[:, 1:], "loss_mask": ones, "position_ids": positions}


def build(options: argparse.Namespace, model: Path, ratio: float | None) -> loop.Trainer:
    """A trainer under a shield of `ratio`; None: stock megatron-core."""
    run = RunConfig(
        model=ModelSection(path=str(model)),
        checkpoint=CheckpointSection(directory="unused"),
        precision=PrecisionSection(dtype=options.dtype),
        data=DataSection(sequence_length=options.length),
        train=TrainSection(iterations=10**6, micro_batch_size=1, global_batch_size=options.batch),
    )
    session, shield = open_session(run), random_shield(model, ratio or 0.0)
    if ratio is not None:
        return loop.Trainer(session, shield)
    stock: Any = lambda config, chunks, _: get_megatron_optimizer(config, chunks)  # noqa: E731
    with mock.patch.object(loop, "build_optimizer", stock), mock.patch.object(loop, "attach", lambda *_: 0):
        return loop.Trainer(session, shield)


def measure(options: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """One row a variant."""
    runtime.start_processes()
    variants = {"stock": build(options, model, None)} | {f"SSU {r}": build(options, model, r) for r in RATIOS}
    data = batches(options)
    seconds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in variants}
    for number in range(options.rounds + 2):
        for name, trainer in variants.items():
            trainer.phases.take()
            begin = time.perf_counter()
            trainer.step(data)
            whole = time.perf_counter() - begin
            phases = trainer.phases.take()
            if number >= 2:
                seconds[name].append((whole, phases["forward-backward"], phases["optimizer"]))
    rows = []
    stock = np.array(seconds["stock"])
    for name, trainer in variants.items():
        own = np.array(seconds[name])
        ratios = np.median(own / stock, axis=0)
        low, high = np.percentile(own[:, 0] / stock[:, 0], (25, 75))
        rows.append(
            {
                "what": name,
                "step_ms": round(1e3 * float(np.median(own[:, 0])), 1),
                "step": round(float(ratios[0]), 3),
                "spread": f"{low:.3f}-{high:.3f}",
                "forward_backward": round(float(ratios[1]), 3),
                "optimizer": round(float(ratios[2]), 3),
                "state_mib": round(model_state(trainer) / 2**20, 1),
            }
        )
    for row in rows:
        row["state"] = round(row["state_mib"] / rows[0]["state_mib"], 3)
    return rows


def model_state(trainer: loop.Trainer) -> int:
    """Bytes of weights, gradient buffers, main weights and moments; a main weight that is the weight itself counts once."""
    weights = {p for chunk in trainer.session.chunks for p in chunk.parameters()}
    total = state_bytes(trainer.optimizer) + sum(p.nbytes for p in weights)
    total += sum(b.grad_data.nbytes for chunk in trainer.chunks for b in chunk.buffers)
    storages = {p.untyped_storage().data_ptr() for p in weights}
    for member in trainer.optimizer.chained_optimizers:
        for group in member.optimizer.param_groups:
            total -= sum(p.nbytes for p in group["params"] if p.untyped_storage().data_ptr() in storages)
    return total


if __name__ == "__main__":
    main()
