"""The training loop: megatron's schedules, DDP and distributed optimizer over a session's model, under a shield."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.num_microbatches_calculator import (
    init_num_microbatches_calculator,
    unset_num_microbatches_calculator,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ssu import runtime
from megatron_ssu.data.loader import iterate
from megatron_ssu.session import Session
from megatron_ssu.shield.file import Shield
from megatron_ssu.shield.local import LocalShield
from megatron_ssu.shield.optimizer import build_optimizer
from megatron_ssu.train.checkpoint import Checkpoints, Identity, Progress
from megatron_ssu.train.schedule import build_schedule
from megatron_ssu.train.telemetry import Telemetry

Batch = dict[str, Tensor]


def language_model_loss(loss: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over the real tokens of a micro-batch: loss [b, s] fp32, mask [b, s]; and [sum, tokens] to report."""
    total, tokens = (loss.float() * mask).sum(), mask.sum()
    report = torch.stack([total.detach().double(), tokens.double()])
    return total / tokens.clamp(min=1), {"loss": report}


def forward_step(iterator: Iterator[Batch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
    """megatron's forward step: one micro-batch through one model chunk."""
    where = runtime.device()
    batch = {key: value.to(where, non_blocking=True) for key, value in next(iterator).items()}
    output = chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, lambda loss: language_model_loss(loss, batch["loss_mask"])


def mean_loss(reports: list[dict[str, Tensor]]) -> float:
    """Mean loss per token over all ranks' micro-batches; reports are empty outside the last pipeline stage."""
    total = torch.zeros(2, dtype=torch.float64, device=runtime.device())
    for report in reports:
        total += report["loss"]
    dist.all_reduce(total)  # tensor-parallel ranks report alike: the ratio stays
    return (total[0] / total[1]).item()


@dataclass
class Step:
    """What one training step came to."""

    loss: float
    grad_norm: float
    lr: float


class Trainer:
    """A session's model with DDP, optimizer and schedule around it."""

    def __init__(self, session: Session, shield: Shield) -> None:
        self.session, self.run, self.mesh = session, session.run, session.mesh
        run = self.run
        self.local_shield = LocalShield(shield, session.layout)
        self.ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, **_ddp_fields(run.parallel.ddp))
        self.chunks = [
            DistributedDataParallel(session.config, self.ddp_config, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(session.chunks)
        ]
        self.optimizer = build_optimizer(self._optimizer_config(), self.chunks, self.local_shield)
        self.schedule = build_schedule(run, self.optimizer)
        self.micro_batches = run.train.global_batch_size // (run.train.micro_batch_size * self.mesh.data)
        self._connect()

    def _optimizer_config(self) -> OptimizerConfig:
        precision = self.session.config
        return OptimizerConfig(
            bf16=precision.bf16,
            params_dtype=precision.params_dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=self.ddp_config.overlap_param_gather,
            **self.run.train.optimizer,
        )

    def _connect(self) -> None:
        """Tell megatron's schedules how gradients are scaled, kept back and synchronised."""
        config, chunks = self.session.config, self.chunks
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads
        if self.ddp_config.overlap_grad_reduce:
            config.no_sync_func = [c.no_sync for c in chunks] if len(chunks) > 1 else chunks[0].no_sync
        unset_num_microbatches_calculator()
        init_num_microbatches_calculator(
            self.mesh.rank,
            None,
            self.run.train.global_batch_size,
            self.run.train.micro_batch_size,
            self.mesh.data,
        )

    def _schedule(self, batches: Iterator[Batch] | list, count: int, *, forward_only: bool) -> list[dict[str, Tensor]]:
        virtual = self.mesh.virtual
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=self.chunks if virtual else self.chunks[0],
            num_microbatches=count,
            seq_length=self.run.data.sequence_length,
            micro_batch_size=self.run.train.micro_batch_size,
            forward_only=forward_only,
        )

    def step(self, batches: Iterator[Batch] | list[Iterator[Batch]]) -> Step:
        """One optimizer step over one global batch; a list of iterators, one a chunk, under virtual pipeline stages."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = self._schedule(batches, self.micro_batches, forward_only=False)
        loss = mean_loss(reports)
        lr = current_lr(self.optimizer)
        _, grad_norm, _ = self.optimizer.step()
        self.schedule.step(increment=1)
        return Step(loss, float(grad_norm), lr)

    def gather_weights(self) -> None:
        """Wait for updated weights that `overlap_param_gather` would fetch in the next forward pass; before reading them."""
        if self.ddp_config.overlap_param_gather:
            for chunk in self.chunks:
                chunk.disable_forward_pre_hook(param_sync=True)
                chunk.enable_forward_pre_hook()

    def evaluate(self, dataset: Any) -> float:
        """Mean loss per token over a validation set, at most train.eval_batches global batches of it."""
        size = self.run.train.global_batch_size
        samples = min(len(dataset), self.run.train.eval_batches * size)
        batches = self._iterators(dataset, 0, stop=samples, pad_to=size, workers=0)
        for chunk in self.chunks:
            chunk.eval()
        reports: list[dict[str, Tensor]] = []
        with torch.no_grad():
            for _ in range(math.ceil(samples / size)):
                reports += self._schedule(batches, self.micro_batches, forward_only=True)
        for chunk in self.chunks:
            chunk.train()
        return mean_loss(reports)

    def batches(self, dataset: Any, consumed: int) -> Iterator[Batch] | list[Iterator[Batch]]:
        """Training batches from sample `consumed` on."""
        return self._iterators(dataset, consumed, workers=self.run.data.loader_workers)

    def _iterators(self, dataset: Any, consumed: int, *, workers: int, **options: Any) -> Any:
        def one() -> Iterator[Batch]:
            return iter(
                iterate(
                    dataset,
                    micro_batch_size=self.run.train.micro_batch_size,
                    dp_rank=self.mesh.data_rank,
                    dp_size=self.mesh.data,
                    consumed_samples=consumed,
                    loader_workers=workers,
                    **options,
                )
            )

        return [one() for _ in self.chunks] if self.mesh.virtual else one()


def _ddp_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """DDP's settings; gradients are reduced in fp32 unless asked otherwise."""
    return {"grad_reduce_in_fp32": True, **fields}


def current_lr(optimizer: MegatronOptimizer) -> float:
    return next(group["lr"] for group in optimizer.param_groups)


@dataclass
class Datasets:
    """What a run reads."""

    train: Any
    source_valid: Any | None
    target_valid: Any | None


def identity_of(session: Session, shield: Shield) -> Identity:
    """The facts that tie a checkpoint to its run."""
    run = session.run
    return Identity(
        {
            "model.path (fingerprint)": shield.fingerprint,
            "shield": shield.digest(),
            "precision.dtype": run.precision.dtype,
            "data.train": str([asdict(s) if not isinstance(s, str) else s for s in run.data.train]),
            "data.split": run.data.split,
            "data.seed": run.data.seed,
            "data.sequence_length": run.data.sequence_length,
            "train.global_batch_size": run.train.global_batch_size,
        }
    )


def train(trainer: Trainer, shield: Shield, datasets: Datasets, telemetry: Telemetry, progress: Progress) -> Progress:
    """Train from `progress` to train.iterations; evaluates and saves on the way. Collective."""
    run, session = trainer.run, trainer.session
    checkpoints = Checkpoints(run.checkpoint.directory, run.checkpoint.keep)
    identity = identity_of(session, shield)

    def evaluate() -> None:
        with telemetry.pause():
            watched = {"source_valid_loss": datasets.source_valid, "target_valid_loss": datasets.target_valid}
            losses = {key: trainer.evaluate(data) for key, data in watched.items() if data is not None}
            telemetry.evaluation(progress.iteration, losses)

    def save() -> None:
        with telemetry.pause():
            trainer.gather_weights()
            path = checkpoints.save(session, progress, identity, trainer.optimizer, trainer.schedule)
            telemetry.say(f"checkpoint {path}")

    if progress.iteration == 0:
        evaluate()
    batches = trainer.batches(datasets.train, progress.samples)
    while progress.iteration < run.train.iterations:
        step = trainer.step(batches)
        progress.iteration += 1
        progress.samples += run.train.global_batch_size
        telemetry.step(progress.iteration, asdict(step))
        last = progress.iteration == run.train.iterations
        if last or _due(progress.iteration, run.train.eval_interval):
            evaluate()
        if last or _due(progress.iteration, run.checkpoint.interval):
            save()
    return progress


def _due(iteration: int, interval: int) -> bool:
    return interval > 0 and iteration % interval == 0
