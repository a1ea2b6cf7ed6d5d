"""What the ranks of the distributed tests do. Module-level functions: they are sent to other processes by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

from megatron_ssu.config.schema import (
    OPTIMIZER_DEFAULTS,
    CalibrationSection,
    CheckpointSection,
    DataSection,
    ModelSection,
    ParallelSection,
    PrecisionSection,
    RunConfig,
    ScheduleSection,
    ShieldSection,
    TrainSection,
)
from megatron_ssu.engine.device import local_device
from megatron_ssu.engine.optimizer import owned, state_bytes
from megatron_ssu.methods.scored import make_shield
from megatron_ssu.models import family
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.hf_export import export_model
from megatron_ssu.models.parallel_model import ParallelModel, open_model
from megatron_ssu.shield.shield_file import Shield, load_shield
from megatron_ssu.train.trainer import Step, Trainer, current_lr, mean_loss

VOCAB, LENGTH, GLOBAL_BATCH = 100, 16, 8


def mesh(tensor: int = 1, pipeline: int = 1, virtual: int | None = None, sequence: bool = False) -> dict[str, Any]:
    """The `parallel` section of a mesh."""
    fields: dict[str, Any] = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    return (
        fields
        | {"sequence_parallel": sequence}
        | ({"virtual_pipeline_model_parallel_size": virtual} if virtual else {})
    )


def run_config(
    model: str, parallel: dict[str, Any], dtype: str = "fp32", ddp: dict[str, Any] | None = None, **sections: Any
) -> RunConfig:
    return RunConfig(
        model=ModelSection(path=model),
        checkpoint=sections.pop("checkpoint", CheckpointSection(directory="unused")),
        parallel=ParallelSection(transformer=parallel, ddp=ddp or {}),
        precision=PrecisionSection(dtype=dtype),  # type: ignore[arg-type]
        **sections,
    )


def logits(model: str, parallel: dict[str, Any], ids: torch.Tensor, dtype: str = "fp32") -> torch.Tensor | None:
    """Logits [b, s, V], unpadded, on the first rank of the last stage."""
    return logits_of(open_model(run_config(model, parallel, dtype)), ids)


def logits_of(session: ParallelModel, ids: torch.Tensor) -> torch.Tensor | None:
    """Logits [b, s, V], unpadded, on the first rank of the last stage; of a model whose weights are up to date."""
    batch, length = ids.shape
    ids = ids.to(local_device())
    positions = torch.arange(length, device=ids.device).expand(batch, -1)
    for chunk in session.chunks:
        chunk.eval()

    def forward_step(iterator: Any, chunk: torch.nn.Module) -> Any:
        return chunk(ids, positions, None), lambda output, non_loss_data: output

    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[None] * session.mesh.chunks,
        model=session.chunks if session.mesh.virtual else session.chunks[0],
        num_microbatches=session.mesh.pipeline if session.mesh.virtual else 1,
        seq_length=length,
        micro_batch_size=batch,
        forward_only=True,
        collect_non_loss_data=True,
    )
    for chunk in session.chunks:
        chunk.train()
    if not session.mesh.last_stage:
        return None
    whole = gather_from_tensor_model_parallel_region(outputs[0])
    return whole[..., : session.source.dims.vocab].detach() if session.mesh.tensor_rank == 0 else None


def convert(model: str, parallel: dict[str, Any], dtype: str, target: str, max_shard_size: int) -> None:
    """Import and export."""
    export(open_model(run_config(model, parallel, dtype)), target, max_shard_size)


def export(session: ParallelModel, target: str, max_shard_size: int = 10**9) -> None:
    export_model(session.layout, session.mesh, session.source.checkpoint, Path(target), max_shard_size)


def plan(
    model: str,
    parallel: dict[str, Any],
    directory: str,
    calibration: str,
    dtype: str,
    samples: int = 24,
    sequence_length: int = 32,
    **shield: Any,
) -> bytes:
    """Score and plan on a mesh; the shield file's bytes."""
    data = CalibrationSection(path=calibration, samples=samples, sequence_length=sequence_length, micro_batch_size=2)
    run = run_config(
        model,
        parallel,
        dtype,
        shield=ShieldSection(calibration=data, **shield),
        checkpoint=CheckpointSection(directory=directory),
    )
    make_shield(open_model(run))
    return (Path(directory) / "shield.safetensors").read_bytes()


class RandomTokens(torch.utils.data.Dataset):
    """Samples of random tokens by number."""

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        stream = torch.randint(0, VOCAB, (LENGTH + 1,), generator=torch.Generator().manual_seed(index))
        return {
            "tokens": stream[:-1],
            "labels": stream[1:],
            "loss_mask": torch.ones(LENGTH),
            "position_ids": torch.arange(LENGTH),
        }


def stock_step(trainer: Trainer, batches: Any) -> Step:
    """A step as megatron's own training loop takes it: `optimizer.step()` clips and updates."""
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    reports = trainer._schedule(batches, trainer.micro_batches, forward_only=False)
    lr = current_lr(trainer.optimizer)
    done, norm, _ = trainer.optimizer.step()
    assert done
    trainer.schedule.step(increment=1)
    return Step(mean_loss(reports)[0], float(norm), lr)


def train_steps(
    model: str,
    parallel: dict[str, Any],
    steps: int,
    *,
    dtype: str = "fp32",
    shield_file: str | None = None,
    stock: bool = False,
    target: str | None = None,
    optimizer: dict[str, Any] | None = None,
    ddp: dict[str, Any] | None = None,
    transformer: dict[str, Any] | None = None,
    precision: dict[str, Any] | None = None,
    fused_adam: bool = True,
) -> dict[str, Any]:
    """Train on random tokens; [loss, grad norm, lr] by step, optimizer state bytes and trainable elements of this rank."""
    run = run_config(
        model,
        parallel,
        dtype,
        ddp,
        data=DataSection(sequence_length=LENGTH, loader_workers=0),
        train=TrainSection(
            iterations=steps,
            micro_batch_size=2,
            global_batch_size=GLOBAL_BATCH,
            fused_adam=fused_adam,
            schedule=ScheduleSection(warmup_fraction=0.1),
            optimizer={**OPTIMIZER_DEFAULTS, "lr": 1e-3, "weight_decay": 0.1, "clip_grad": 0.5, **(optimizer or {})},
        ),
    )
    run.model.transformer.update(transformer or {})
    run.precision.transformer.update(precision or {})
    session = open_model(run)
    fingerprint = model_fingerprint(model)
    shield = load_shield(shield_file) if shield_file else Shield("none", "m", fingerprint, matrices={}, masks={})
    trainer = Trainer(session, shield)
    batches = trainer.batches(RandomTokens(), 0)
    history = []
    for _ in range(steps):
        step = stock_step(trainer, batches) if stock else trainer.step(batches)
        history.append((step.loss, step.grad_norm, step.lr))
    trainer.gather_weights()
    if target:
        export(session, target)
    compact = trainer.compact
    return {
        "history": history,
        "state_bytes": state_bytes(trainer.optimizer),
        "owned": sum(part.stop - part.start for part in owned(trainer.optimizer)),
        "trainable": sum(_trainable(part, compact) for part in owned(trainer.optimizer)),
        "gradients": sum(
            buffer.grad_data.numel()
            for chunk in trainer.chunks
            for buffer in chunk.buffers + chunk.expert_parallel_buffers
        ),
        "compact": {name: list(p.shape) for name, p in session.chunks[0].named_parameters() if "compact_" in name},
        "weights": [p.detach().clone() for chunk in session.chunks for p in chunk.parameters()]
        if stock or not target
        else None,
    }


def _trainable(part: Any, compact: Any) -> int:
    """Elements of a rank's range that are neither frozen nor padding."""
    found = compact.matrix(part.param)
    if found is not None:
        real, width = found[0].part.real, part.param.shape[1]
        flat = torch.zeros(part.param.shape, dtype=torch.bool)
        flat[: real[0], : real[1]] = True
        assert width % 16 == 0 or real[1] == width
        return int(flat.view(-1)[part.start : part.stop].sum())
    pinned = next((p for p in compact.pinned.values() if p.weight is part.param), None)
    if pinned is None:
        return part.stop - part.start
    frozen = pinned.pinned.to("cpu").expand(torch.ones(pinned.pinned.size))
    return int((frozen[part.start : part.stop] == 0).sum())


def padded_vocab() -> int:
    """Rows of embedding and head of the test models."""
    return family.padded_vocab(VOCAB, ModelSection(path="").make_vocab_size_divisible_by)
