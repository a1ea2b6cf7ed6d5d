"""What train.regularize adds to the loss: pulls towards the source model's weights (L2) and predictions (KL).

The training loss is loss + l2 * L2 + kl * KL, with the coefficients of train.regularize and

    L2   1/2 ||W - W_source||^2 over what trains: L2-SP (Li et al. 2018, arXiv 1802.01483)
    KL   T^2 KL(p_source || p_model) at the temperature T, mean over the real tokens of the training batches

Both are measured from the weights of model.path, whatever checkpoint a run resumes from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import Tensor

from megatron_ssu.compact.parameters import CompactParameters
from megatron_ssu.config.schema import PrecisionSection, RegularizeSection, RunConfig
from megatron_ssu.engine.device import local_device
from megatron_ssu.engine.optimizer import Owned, owned
from megatron_ssu.errors import UserError
from megatron_ssu.methods.base import Method
from megatron_ssu.models.parallel_model import ParallelModel, build_model
from megatron_ssu.ops.kl_divergence import kl_divergence
from megatron_ssu.train.micro_batches import Batch, read_batch, run_chunk, run_schedule

CHUNK = 1 << 23  # elements that temporaries are made of at a time
# Settings that a model which is only run forward has no use for; of some it would keep its inputs.
_BACKWARD = (
    *("recompute_", "cpu_offloading", "fine_grained_activation_offloading", "offload_modules", "min_offloaded_"),
    *("enable_cuda_graph", "external_cuda_graph", "cuda_graph_", "defer_embedding_wgrad_compute", "wgrad_deferral_"),
    "delay_wgrad_compute",
)


def check_regularizers(section: RegularizeSection, method: Method) -> None:
    """Raises UserError where the method does not train what L2 pulls."""
    if section.l2 and method.adapts:
        raise UserError(
            f"train.regularize.l2: {section.l2} does not go with method {method.name}, whose adapters the source does not "
            "have; leave it out: train.optimizer.weight_decay on adapters pulls towards the source"
        )


class Regularizers:
    """Those of a trainer whose optimizer has its state; none of them where both coefficients are 0. Collective."""

    def __init__(self, model: ParallelModel, optimizer: MegatronOptimizer, compact: CompactParameters) -> None:
        section = model.run.train.regularize
        self.l2 = SourceWeights(optimizer, compact, section.l2) if section.l2 else None
        self.kl = SourcePredictions(model, section.kl, section.kl_temperature) if section.kl else None

    def ahead(self, batches: Iterator[Batch] | list[Iterator[Batch]], count: int) -> Iterator[Batch] | list:
        """The step's `count` micro-batches, when the source has seen those that it must see before training does."""
        return batches if self.kl is None else self.kl.ahead(batches, count)

    def on_gradients(self, gradients: Iterable[tuple[Owned, Tensor]]) -> None:
        """Add to reduced gradients in place; see Method.on_gradients."""
        if self.l2 is not None:
            self.l2.on_gradients(gradients)

    def values(self) -> dict[str, float]:
        """`l2` and `kl` of the step, without their coefficients, over all ranks. Collective where there are any."""
        if self.l2 is None and self.kl is None:
            return {}
        sums = torch.zeros(3, dtype=torch.float64, device=local_device())
        if self.l2 is not None:
            sums[0] = self.l2.take()
        if self.kl is not None:
            sums[1:] = self.kl.take()
        dist.all_reduce(sums)  # tensor-parallel ranks report the same tokens: the ratio stays
        square, total, tokens = sums.tolist()
        found = {} if self.l2 is None else {"l2": square / 2}
        return found if self.kl is None else {**found, "kl": total / max(tokens, 1.0)}


@dataclass(frozen=True)
class _Copy:
    """Of a range that this rank owns: the source's values, fp32, and by CHUNK the places of its pinned elements."""

    values: Tensor
    pinned: tuple[Tensor | None, ...]


class SourceWeights:
    """L2: fp32 copies of the main weights that this rank owns, as they are now."""

    def __init__(self, optimizer: MegatronOptimizer, compact: CompactParameters, coefficient: float) -> None:
        self.coefficient = coefficient
        pinned = {found.weight: found for found in compact.pinned.values()}
        self._copies: dict[torch.nn.Parameter, _Copy] = {}
        for part in owned(optimizer):
            values = part.main.detach().to(torch.float32, copy=True).view(-1)
            found = pinned.get(part.param)
            places = None if found is None else found.places(part.start, part.stop).to(values.device)
            self._copies[part.param] = _Copy(values, tuple(_by_chunk(places, values.numel())))
        self._square = torch.zeros((), dtype=torch.float64, device=local_device())

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(copy.values.nbytes for copy in self._copies.values())

    @torch.no_grad()
    def on_gradients(self, gradients: Iterable[tuple[Owned, Tensor]]) -> None:
        """Add coefficient * (main - source); pinned elements, whose main weights weight decay moves, get nothing."""
        for part, gradient in gradients:
            copy, counts = self._copies[part.param], _counts(part.param)
            parts = (tensor.detach().view(-1).split(CHUNK) for tensor in (gradient, part.main, copy.values))
            for into, main, source, pinned in zip(*parts, copy.pinned, strict=True):
                gap = main.float() - source
                if pinned is not None:
                    gap.index_fill_(0, pinned, 0.0)
                if counts:
                    self._square += torch.linalg.vector_norm(gap, dtype=torch.float64).square()
                into.add_(gap.to(into.device), alpha=self.coefficient)

    def take(self) -> Tensor:
        """float64 []: this rank's share of ||W - W_source||^2, which is set to 0."""
        found = self._square.clone()
        self._square.zero_()
        return found


def _counts(param: torch.nn.Parameter) -> bool:
    """Whether a parameter counts here; else ranks of another tensor or pipeline rank hold the same."""
    return param_is_not_tensor_parallel_duplicate(param) and not getattr(param, "shared", False)


def _by_chunk(places: Tensor | None, count: int) -> Iterator[Tensor | None]:
    """Ascending places in [0, count) as places in each CHUNK; None where there are none."""
    for first in range(0, max(count, 1), CHUNK):
        here = None if places is None else places[(places >= first) & (places < first + CHUNK)] - first
        yield here if here is not None and here.numel() else None


class SourcePredictions:
    """KL: a frozen copy of the source on the same mesh, whose logits stay where they are computed.

    Without a pipeline the source is run when a micro-batch's logits are there; with one, over all micro-batches of the step
    before training begins, and the last stage keeps their logits.
    """

    def __init__(self, model: ParallelModel, coefficient: float, temperature: float) -> None:
        self.coefficient, self.temperature = coefficient, temperature
        self.source = build_model(forward_run(model.run), model.source, model.mesh)
        for chunk in self.source.chunks:
            chunk.requires_grad_(False).eval()
        group = parallel_state.get_tensor_model_parallel_group()
        self._group = group if group.size() > 1 else None
        self._logits: deque[Tensor] = deque()
        self._sums = torch.zeros(2, dtype=torch.float64, device=local_device())

    @torch.no_grad()
    def ahead(self, batches: Iterator[Batch] | list[Iterator[Batch]], count: int) -> Iterator[Batch] | list:
        """See Regularizers. The micro-batches are kept on the CPU meanwhile."""
        mesh, run = self.source.mesh, self.source.run
        if mesh.pipeline == 1:
            return batches
        read = [list(islice(one, count)) for one in (batches if isinstance(batches, list) else [batches])]

        def again() -> Any:
            return [iter(one) for one in read] if mesh.virtual else iter(read[0])

        self._logits = deque(
            run_schedule(
                run, partial(_forward_step, run), self.source.chunks, again(), count, forward_only=True, collect=True
            )
        )
        return again()

    @torch.no_grad()
    def _source_logits(self, batch: Batch) -> Tensor:
        """[b, s, V / TP]: those of the micro-batch whose turn it is."""
        if self.source.mesh.pipeline > 1:
            return self._logits.popleft()
        return run_chunk(self.source.chunks[0], batch)

    def divergence(self, batch: Batch, logits: Tensor) -> Tensor:
        """[b, s] fp32: by token of a micro-batch whose logits [b, s, V / TP] the model has given. On the last stage."""
        return kl_divergence(logits, self._source_logits(batch), self.temperature, self._group)

    def count(self, report: Tensor) -> None:
        """Add a micro-batch's [sum, tokens] to those of the step."""
        self._sums += report

    def take(self) -> Tensor:
        """float64 [2]: this rank's sum and tokens, which are set to 0."""
        found = self._sums.clone()
        self._sums.zero_()
        return found


def _forward_step(run: RunConfig, iterator: Iterator[Batch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
    return run_chunk(chunk, read_batch(iterator, run)), lambda logits, non_loss_data: logits


def forward_run(run: RunConfig) -> RunConfig:
    """The run file for a model that is only run forward: without FP8, whose scales no checkpoint would hold."""

    def kept(fields: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in fields.items() if not key.startswith(_BACKWARD)}

    return replace(
        run,
        model=replace(run.model, transformer=kept(run.model.transformer)),
        parallel=replace(run.parallel, transformer=kept(run.parallel.transformer)),
        precision=PrecisionSection(dtype=run.precision.dtype),
    )
