"""One training step: megatron's schedules, DDP and distributed optimizer over a parallel model, under a shield."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.num_microbatches_calculator import (
    init_num_microbatches_calculator,
    unset_num_microbatches_calculator,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_ssu.compact.trial import tried_gemm
from megatron_ssu.config.schema import RunConfig
from megatron_ssu.config.sources import counts_tokens
from megatron_ssu.data.loader import iterate
from megatron_ssu.engine.autograd import after_backward
from megatron_ssu.engine.device import has_cuda, local_device
from megatron_ssu.engine.linear import accumulate_in_gemm
from megatron_ssu.engine.optimizer import Owned, choose_adam_kernel, gradients, make_moments, owned_gradients
from megatron_ssu.engine.release import release
from megatron_ssu.engine.tensors import scale_all
from megatron_ssu.methods.base import Method, nothing_frozen
from megatron_ssu.models.parallel_model import ParallelModel
from megatron_ssu.shield.shield_file import Shield
from megatron_ssu.train.checkpoints import Progress
from megatron_ssu.train.micro_batches import Batch, read_batch, run_chunk, run_schedule
from megatron_ssu.train.optimizer_state import OptimizerState
from megatron_ssu.train.regularizers import Regularizers, SourcePredictions
from megatron_ssu.train.schedule import build_schedule
from megatron_ssu.train.times import Times
from megatron_ssu.train.update_norms import update_norms

LossReport = dict[str, Tensor]


def language_model_loss(
    loss: Tensor, mask: Tensor, *, by_tokens: bool = False
) -> tuple[Tensor, LossReport] | tuple[Tensor, Tensor, LossReport]:
    """Mean over the real tokens of a micro-batch: loss [b, s] fp32, mask [b, s]; and [sum, tokens] to report.

    Under context parallelism it is this rank's part of that mean: the ranks' parts add up to it. With `by_tokens` it is the
    sum, and after it how many tokens they are: megatron divides by those of the whole global batch.
    """
    total, tokens = (loss.float() * mask).sum(), mask.sum()
    report = torch.stack([total.detach().double(), tokens.double()])
    if by_tokens:
        return total, tokens.to(torch.int), {"loss": report}
    group = parallel_state.get_context_parallel_group()
    if group.size() > 1:
        tokens = tokens.clone()
        dist.all_reduce(tokens, group=group)
    return total / tokens.clamp(min=1), {"loss": report}


def forward_step(
    run: RunConfig, iterator: Iterator[Batch], chunk: torch.nn.Module, kl: SourcePredictions | None = None
) -> tuple[Tensor, Any]:
    """megatron's forward step: one micro-batch, or this rank's part of its sequences, through one model chunk."""
    batch, by_tokens = read_batch(iterator, run), counts_tokens(run)
    if kl is not None:
        output = run_chunk(chunk, batch)
        return output, lambda logits: loss_with_kl(kl, chunk, batch, logits, by_tokens=by_tokens)
    output = run_chunk(chunk, batch, batch["labels"])
    return output, lambda loss: language_model_loss(loss, batch["loss_mask"], by_tokens=by_tokens)


def loss_with_kl(
    kl: SourcePredictions, chunk: torch.nn.Module, batch: Batch, logits: Tensor, *, by_tokens: bool = False
) -> tuple[Tensor, LossReport] | tuple[Tensor, Tensor, LossReport]:
    """As `language_model_loss`, which it reports, with the divergence added; logits [b, s, V / TP], which are overwritten."""
    added, *_, divergences = language_model_loss(kl.divergence(batch, logits), batch["loss_mask"], by_tokens=by_tokens)
    kl.count(divergences["loss"])
    cross_entropy = get_attr_wrapped_model(chunk, "compute_language_model_loss")
    # It takes logits [s, b, V / TP] for labels [b, s]; with both the other way round nothing is copied.
    losses = cross_entropy(batch["labels"].t(), logits).t()
    loss, *rest = language_model_loss(losses, batch["loss_mask"], by_tokens=by_tokens)
    return loss + kl.coefficient * added, *rest  # type: ignore[return-value]


def mean_loss(reports: list[dict[str, Tensor]], votes: Sequence[float] = ()) -> tuple[float, list[float]]:
    """Mean loss per token over all ranks' micro-batches, and the ranks' `votes` summed, in one all-reduce.

    Reports are empty outside the last pipeline stage.
    """
    total = torch.zeros(2 + len(votes), dtype=torch.float64, device=local_device())
    for report in reports:
        total[:2] += report["loss"]
    if votes:
        total[2:] = torch.tensor(votes, dtype=torch.float64)
    dist.all_reduce(total)  # tensor-parallel ranks report alike: the ratio stays
    loss, tokens, *counts = total.tolist()
    return (loss / tokens if tokens else math.nan), counts


@dataclass
class Step:
    """What one training step came to."""

    loss: float
    grad_norm: float
    lr: float
    skipped: bool = False  # loss or gradient norm was not finite: no weight moved
    votes: list[float] = field(default_factory=list)  # summed over ranks
    update_norms: dict[str, float] = field(default_factory=dict)  # by kind, where asked for
    terms: dict[str, float] = field(default_factory=dict)  # of train.regularize, without coefficients


class Trainer:
    """A session's model with DDP, optimizer and schedule around it."""

    def __init__(self, session: ParallelModel, shield: Shield | None = None, method: Method | None = None) -> None:
        """Without a `shield` nothing is frozen; without a `method` nothing happens but training."""
        self.session, self.run, self.mesh = session, session.run, session.mesh
        run, self.method = self.run, method or Method()
        shield = shield or nothing_frozen(self.method.name, session.source)
        gemm = tried_gemm(session.config) if shield.masks else None
        self.compact = self.method.attach(session, shield, gemm)
        if run.parallel.transformer.get("gradient_accumulation_fusion", True):
            accumulate_in_gemm(session.chunks)
        self.ddp_config = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            **ddp_fields(run.parallel.ddp, average=has_cuda() and not counts_tokens(run)),
        )
        self.chunks = [
            DistributedDataParallel(session.config, self.ddp_config, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(session.chunks)
        ]
        self.optimizer = get_megatron_optimizer(self._optimizer_config(), self.chunks)
        choose_adam_kernel(self.optimizer, run.train.fused_adam)
        # What lasts is allocated before what comes and goes, and what does not fit is known before the first batch.
        make_moments(self.optimizer)
        self.optimizer_state = OptimizerState(self.optimizer, self.compact)
        self._follows_backward = type(self.method).after_backward is not Method.after_backward
        self.compact.start()
        self.regularizers = Regularizers(session, self.optimizer, self.compact)  # no checkpoint is loaded yet
        self.times = Times()
        self.mark: Callable[[str], None] = lambda doing: None  # called with what the loop begins
        self.waits: Callable[[], AbstractContextManager] = nullcontext  # around what reads numbers of all ranks
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
            # Checkpoints have whole main weights, of which a precision-aware optimizer would keep the lower halves alone.
            **{"store_param_remainders": False, **self.run.train.optimizer},
        )

    def _connect(self) -> None:
        """Set in megatron's config how gradients are scaled, kept back and synchronised."""
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

    def _forward_step(self, iterator: Iterator[Batch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        output, loss = forward_step(self.run, iterator, chunk, self.regularizers.kl if chunk.training else None)
        if self._follows_backward and output.requires_grad:
            number = next(i for i, own in enumerate(self.chunks) if own is chunk)
            after_backward(output, lambda: self.method.after_backward(number))
        return output, loss

    def _schedule(self, batches: Iterator[Batch] | list, count: int, *, forward_only: bool) -> list[dict[str, Tensor]]:
        return run_schedule(self.run, self._forward_step, self.chunks, batches, count, forward_only=forward_only)

    def step(
        self,
        batches: Iterator[Batch] | list[Iterator[Batch]],
        votes: Callable[[], Sequence[float]] = tuple,
        *,
        measure: bool = False,
    ) -> Step:
        """One optimizer step over one global batch; a list of iterators, one a chunk, under virtual pipeline stages.

        What `votes` returns at the end of the backward pass is summed over the ranks; `measure` asks for the update
        norms. A loss or gradient norm that is not finite leaves weights and moments as they are, on all ranks alike:
        both numbers are the same on all.
        """
        self.mark("forward-backward")
        with self.times("forward-backward"):
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            batches = self.regularizers.ahead(batches, self.micro_batches)
            reports = self._schedule(batches, self.micro_batches, forward_only=False)
            with self.waits():
                loss, counts = mean_loss(reports, votes())
        self.mark("optimizer")
        with self.times("optimizer"):
            self.compact.drop_gradients()
            step = Step(loss, math.nan, current_lr(self.optimizer), votes=counts)
            step.grad_norm = prepare_step(
                self.optimizer, self.waits, self.regularizers.on_gradients, self.method.on_gradients
            )
            with self.waits():
                step.terms = self.regularizers.values()
            step.skipped = not (math.isfinite(loss) and math.isfinite(step.grad_norm))
            if not step.skipped:
                clip(self.optimizer, step.grad_norm)
                self.optimizer.step_with_ready_grads()
                self.compact.updated(gathered=not self.ddp_config.overlap_param_gather)
                if measure:
                    with self.waits():
                        step.update_norms = update_norms(self.optimizer, self.session.layout, self.compact)
            self.optimizer.zero_grad()
            self.schedule.step(increment=1)
        return step

    def resume(self, progress: Progress) -> None:
        """Put the learning rate where `progress` is; after a checkpoint was loaded."""
        self.schedule = build_schedule(self.run, self.optimizer)
        self.schedule.step(increment=progress.iteration)

    def gather_weights(self) -> None:
        """Bring the weights up to date, which `overlap_param_gather` leaves to the next forward pass; before reading them."""
        if self.ddp_config.overlap_param_gather:
            for chunk in self.chunks:
                chunk.disable_forward_pre_hook(param_sync=True)
                chunk.enable_forward_pre_hook()
            self.compact.hook()
        self.compact.write()

    def release(self) -> None:
        """Free the model's weights and all that trained them; neither trainer nor model can be used after it."""
        release(self.session.config, self.chunks, self.optimizer)

    def evaluate(self, dataset: Any) -> float:
        """Mean loss per token over a validation set, at most train.eval_batches global batches of it."""
        size = self.run.train.global_batch_size
        samples = min(len(dataset), self.run.train.eval_batches * size)
        batches = self._iterators(dataset, 0, what="evaluation", stop=samples, pad_to=size, workers=0)
        for chunk in self.chunks:
            chunk.eval()
        reports: list[dict[str, Tensor]] = []
        with torch.no_grad():
            for _ in range(math.ceil(samples / size)):
                self.mark("evaluation")
                reports += self._schedule(batches, self.micro_batches, forward_only=True)
        for chunk in self.chunks:
            chunk.train()
        with self.waits():
            return mean_loss(reports)[0]

    def batches(self, dataset: Any, consumed: int) -> Iterator[Batch] | list[Iterator[Batch]]:
        """Training batches from sample `consumed` on."""
        return self._iterators(dataset, consumed, workers=-(-self.run.data.loader_workers // self.mesh.chunks))

    def _iterators(self, dataset: Any, consumed: int, *, workers: int, what: str = "data", **options: Any) -> Any:
        def one() -> Iterator[Batch]:
            return self._timed(
                what,
                iterate(
                    dataset,
                    micro_batch_size=self.run.train.micro_batch_size,
                    dp_rank=self.mesh.data_rank,
                    dp_size=self.mesh.data,
                    consumed_samples=consumed,
                    loader_workers=workers,
                    **options,
                ),
            )

        return [one() for _ in self.chunks] if self.mesh.virtual else one()

    def _timed(self, what: str, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time until each is there is booked on `what`."""
        while True:
            self.mark("data")
            with self.times(what):
                batch = next(batches, None)
            self.mark("forward-backward")
            if batch is None:
                return
            yield batch


def ddp_fields(fields: dict[str, Any], *, average: bool) -> dict[str, Any]:
    """DDP's settings; gradients are reduced in fp32, and with `average` averaged in passing, unless asked otherwise."""
    return {"grad_reduce_in_fp32": True, "average_in_collective": average, **fields}


def current_lr(optimizer: MegatronOptimizer) -> float:
    return next((group["lr"] for group in optimizer.param_groups), 0.0)  # none where nothing trains


@torch.no_grad()
def prepare_step(
    optimizer: MegatronOptimizer,
    waits: Callable[[], AbstractContextManager] = nullcontext,
    *changes: Callable[[Iterator[tuple[Owned, Tensor]]], None],
) -> float:
    """Bring the gradients to the main weights; their norm, the same on all ranks. The first half of `optimizer.step`.

    `waits` is a context around what waits for the other ranks; `changes` may change the gradients before their norm, in turn.
    """
    if optimizer.prepare_grads():
        return math.inf
    for change in changes:
        with waits():
            change(owned_gradients(optimizer))
    with waits():
        return float(optimizer.get_grad_norm())


@torch.no_grad()
def clip(optimizer: MegatronOptimizer, norm: float) -> None:
    """Scale gradients of norm `norm` down to train.optimizer.clip_grad: megatron's formula, in place and in one pass."""
    grads, coefficient = list(gradients(optimizer)), optimizer.config.clip_grad / (norm + 1e-6)
    if grads and 0 < coefficient < 1:
        scale_all(grads, coefficient)
