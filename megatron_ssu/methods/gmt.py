"""GMT, gradient-mask tuning (Li et al. 2024, arXiv 2406.15330): only the largest gradient elements of each matrix act.

No weight is frozen: Adam's moments move an element whose gradient is masked, and so does weight decay. Embedding and head train
whole. `mask: step` masks the gradient of the whole batch once, before its norm and the update; `mask: micro_batch`, as the SSU
paper's code, masks what has been added up after every micro-batch, on each data-parallel rank by itself, so that results depend
on the number of micro-batches and of data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from megatron_ssu.errors import UserError
from megatron_ssu.methods.base import Method
from megatron_ssu.shield.budget import units_of_ratio

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_ssu.compact.parameters import CompactParameters
    from megatron_ssu.config.schema import RunConfig
    from megatron_ssu.engine.linear import Gemm
    from megatron_ssu.engine.optimizer import Owned
    from megatron_ssu.models.layout import LocalParam
    from megatron_ssu.models.matrix import Matrix
    from megatron_ssu.models.parallel_model import ParallelModel
    from megatron_ssu.shield.shield_file import Shield


@dataclass(frozen=True)
class GradientMaskOptions:
    """Options of GMT."""

    keep: float = 0.5  # fraction of each matrix's gradient elements, those of largest magnitude; ties stay
    mask: Literal["step", "micro_batch"] = "step"


class GradientMaskTuning(Method):
    """Masks gradients; see the module docstring."""

    name: ClassVar[str] = "gmt"
    summary: ClassVar[str] = "gradient-mask tuning"
    Options: ClassVar[type] = GradientMaskOptions
    experts: ClassVar[bool] = False  # its thresholds are taken over groups of ranks that hold the same weights

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._locals: list[LocalParam] = []  # of this rank's chunks, less embedding and head
        self._chunks: list[list[LocalParam]] = []  # the same, by chunk

    def validate(self, run: RunConfig, matrices: Sequence[Matrix]) -> None:
        super().validate(run, matrices)
        if not 0 < self.options.keep <= 1:
            raise UserError(f"method.gmt.keep: must be above 0 and at most 1, got {self.options.keep}")
        if self.options.mask == "micro_batch" and run.parallel.sequence_parallel:
            raise UserError(
                "parallel.sequence_parallel: does not go with method.gmt.mask: micro_batch, since each rank then has the "
                "gradients of a part of the tokens; leave it out"
            )
        if self.options.mask == "micro_batch" and run.parallel.ddp.get("overlap_grad_reduce"):
            raise UserError(
                "parallel.ddp.overlap_grad_reduce: does not go with method.gmt.mask: micro_batch, which masks gradients before "
                "their reduction; leave it out"
            )

    def attach(self, model: ParallelModel, shield: Shield, gemm: Gemm | None) -> CompactParameters:
        chosen = {local.param: local for local in model.layout if local.matrices[0].kind not in ("embedding", "head")}
        self._chunks = [[chosen[p] for p in chunk.parameters() if p in chosen] for chunk in model.chunks]
        self._locals = list(chosen.values())
        return super().attach(model, shield, gemm)

    def on_gradients(self, gradients: Iterable[tuple[Owned, Tensor]]) -> None:
        if self.options.mask != "step":
            return
        from megatron.core import parallel_state

        own = {part.param: (part.start, gradient) for part, gradient in gradients}
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        self._mask(self._locals, own, group)

    def after_backward(self, chunk: int) -> None:
        if self.options.mask != "micro_batch":
            return
        from megatron.core import parallel_state

        parts = self._chunks[chunk]
        own = {local.param: (0, local.param.main_grad.view(-1)) for local in parts}  # type: ignore[attr-defined]
        self._mask(parts, own, parallel_state.get_tensor_model_parallel_group())

    def _mask(self, parts: Sequence[LocalParam], own: dict[Any, tuple[int, Tensor]], group: Any) -> None:
        """Zero all but the largest gradients of each matrix in `parts`; `own`: first element and gradient of a flat range."""
        from megatron_ssu.engine.device import local_device
        from megatron_ssu.ops.order import kth_largest_bits, magnitude_bits

        sets: list[Callable[[], Tensor]] = []
        counts: list[int] = []
        for local in parts:
            for matrix in local.matrices:
                sets.append(partial(_bits, local, matrix, own))
                counts.append(max(1, units_of_ratio(self.options.keep, matrix.elements)))
        if not sets:
            return
        thresholds = iter(kth_largest_bits(sets, counts, group, local_device()))
        for local in parts:
            for matrix in local.matrices:
                threshold = next(thresholds)
                for part in _ranges(local, matrix, own):
                    part.masked_fill_(magnitude_bits(part) < threshold, 0)


def _ranges(local: LocalParam, matrix: Matrix, own: dict[Any, tuple[int, Tensor]]) -> Iterator[Tensor]:
    """Views of the gradients, flat, that this rank has of a matrix."""
    found = own.get(local.param)
    piece = next((p for p in local.pieces if p.matrix == matrix), None)
    if found is None or piece is None:
        return
    start, gradient = found
    width = local.param[0].numel()
    for run in piece.runs:
        low = max(run.shard_row * width - start, 0)
        high = min((run.shard_row + run.count) * width - start, gradient.numel())
        if low < high:
            yield gradient[low:high]


def _bits(local: LocalParam, matrix: Matrix, own: dict[Any, tuple[int, Tensor]]) -> Tensor:
    """int32: magnitudes of the gradients that this rank counts; of what tensor-parallel ranks share, the first counts all."""
    import torch
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

    from megatron_ssu.ops.order import magnitude_bits

    parts = list(_ranges(local, matrix, own)) if param_is_not_tensor_parallel_duplicate(local.param) else []
    if not parts:
        return torch.empty(0, dtype=torch.int32, device=local.param.device)
    return magnitude_bits(torch.cat(parts))
