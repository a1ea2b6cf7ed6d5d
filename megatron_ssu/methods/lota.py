"""LoTA, lottery ticket adaptation (Panda et al. 2024, arXiv 2406.16797): train only the elements that a probe moved most.

A probe trains all weights for a while on the run's training data; of all layers' weights together, those that moved least are
frozen; then everything goes back to the source's weights, and the run begins with a fresh optimizer, schedule and data.
Movement is measured in the optimizer's fp32 main weights, where bf16 weights would tie at zero, and ties are broken by the
order of matrices and elements, so that exactly the asked fraction is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from megatron_ssu.errors import UserError
from megatron_ssu.methods.base import Job, Method
from megatron_ssu.methods.drawn import shield_of, whole
from megatron_ssu.methods.shield_place import kept_shield, own_shield, own_shield_path, refuse_given_files
from megatron_ssu.methods.training_facts import DOCUMENTS, shown, training_facts
from megatron_ssu.shield.budget import check_ratio, units_of_ratio
from megatron_ssu.shield.mask import Granularity, Mask
from megatron_ssu.shield.shield_file import Shield, load_shield

if TYPE_CHECKING:
    import torch
    from megatron.core.optimizer import MegatronOptimizer
    from torch import Tensor

    from megatron_ssu.config.schema import RunConfig
    from megatron_ssu.models.family import Dims
    from megatron_ssu.models.layout import LocalParam
    from megatron_ssu.models.matrix import Matrix
    from megatron_ssu.models.parallel_model import ParallelModel
    from megatron_ssu.models.source import Source

_EDGES = ("embedding", "head")
_TRAINED_ON = "trained_on"  # of a shield's plan: facts of the probe beside the method's options
_OF_THE_PROBE = ("weight_decay", "clip_grad")  # of train.optimizer: the probe has its own


@dataclass(frozen=True)
class LotteryOptions:
    """Options of LoTA."""

    sparsity: float = 0.9  # fraction of the layers' weights, norms included, that is frozen
    iterations: int = 100  # steps of the probe
    lr: float = 5.0e-5  # constant learning rate of the probe
    weight_decay: float = 0.01  # of the probe
    embeddings: bool = True  # embedding and head train whole, as in the SSU paper's code; the original: false


class LotteryTicketAdaptation(Method):
    """An element shield that a probe run makes."""

    name: ClassVar[str] = "lota"
    summary: ClassVar[str] = "lottery ticket adaptation"
    Options: ClassVar[type] = LotteryOptions
    experts: ClassVar[bool] = False  # its thresholds are taken over groups of ranks that hold the same weights
    shields: ClassVar[bool] = True

    @property
    def probe_iterations(self) -> int:
        return int(self.options.iterations)

    def validate(self, run: RunConfig, matrices: Sequence[Matrix]) -> None:
        options = self.options
        refuse_given_files(run)
        check_ratio(options.sparsity, "method.lota.sparsity")
        if options.iterations < 1:
            raise UserError(f"method.lota.iterations: must be at least 1, got {options.iterations}")
        if not 0 < options.lr < float("inf"):
            raise UserError(
                f"method.lota.lr: must be above 0, got {options.lr}; a probe that moves nothing says nothing"
            )
        if not 0 <= options.weight_decay < float("inf"):
            raise UserError(f"method.lota.weight_decay: must be 0 or more, got {options.weight_decay}")

    def check(self, run: RunConfig, source: Source, *, begun: bool) -> None:
        path = own_shield_path(run)
        if path.exists():
            found = load_shield(path)
            plan = {key: value for key, value in found.plan.items() if key != _TRAINED_ON}
            if found.method != self.name or plan != asdict(self.options):
                raise UserError(
                    f"{path}: was made by method {found.method} ({_words(plan)}), and the run file asks for {self.name} "
                    f"({_words(asdict(self.options))}); change that back, or choose another checkpoint.directory"
                )
            if not begun:
                _compare(path, found, {key: value for key, value in _facts(run, ()).items() if key != DOCUMENTS})
            own_shield(run, source)
        elif begun:
            raise UserError(
                f"{path}: is gone, and the run has begun under it; restore it, or start in another directory"
            )

    def present_shield(self, run: RunConfig, source: Source) -> Shield | None:
        self.check(run, source, begun=True)
        return own_shield(run, source)

    def prepare(self, job: Job) -> Shield | None:
        from megatron_ssu.engine.random_numbers import kept_generators
        from megatron_ssu.engine.ranks import on_all_ranks, on_rank_zero

        run, source, path = job.model.run, job.model.source, own_shield_path(job.model.run)
        facts = _facts(run, job.train_digests)
        if not on_rank_zero(path.exists):
            plan = {**asdict(self.options), _TRAINED_ON: facts}
            with kept_generators():  # a start that finds the shield file draws nothing here
                masks = self._probe(job)
                on_rank_zero(lambda: kept_shield(run, shield_of(self.name, source, masks, plan)))
                job.rebuild()
        elif not job.begun:  # else its checkpoint is compared
            on_rank_zero(lambda: _compare(path, load_shield(path), facts))
        return on_all_ranks(lambda: own_shield(run, source))

    def expected_shield(
        self, run: RunConfig, matrices: Sequence[Matrix], dims: Dims
    ) -> Mapping[str, tuple[Granularity, float]]:
        sparsity = self.options.sparsity
        return {matrix.name: ("element", sparsity) for matrix in matrices if matrix.kind not in _EDGES} | self._edges(
            matrices
        )

    def _edges(self, matrices: Sequence[Matrix]) -> dict[str, tuple[Granularity, float]]:
        return {} if self.options.embeddings else {m.name: ("row", 1.0) for m in matrices if m.kind in _EDGES}

    def _probe(self, job: Job) -> dict[str, Mask]:
        """The masks, on rank 0. Collective."""
        options, model = self.options, job.model
        optimizer = {
            **model.run.train.optimizer,
            "lr": options.lr,
            "min_lr": options.lr,
            "weight_decay": options.weight_decay,
            "clip_grad": 0.0,
        }
        trainer = job.probe(model, options.iterations, optimizer)
        moved = moved_bits(trainer.optimizer, model)
        trainer.release()  # the run's model is built beside it
        masks = most_moved(model, moved, options.sparsity)
        if not options.embeddings:
            masks |= {m.name: whole(m) for m in model.source.family.matrices(model.source.dims) if m.kind in _EDGES}
        return masks


def moved_bits(optimizer: MegatronOptimizer, model: ParallelModel) -> dict[torch.nn.Parameter, tuple[int, Tensor]]:
    """By parameter of the layers: first element, and `magnitude_bits` [n] of main weight - source, of what this rank owns."""
    import torch

    from megatron_ssu.engine.optimizer import MAIN, owned
    from megatron_ssu.models.hf_import import fill
    from megatron_ssu.ops.order import magnitude_bits

    locals_of = {local.param: local for local in model.layout}
    found = {}
    with torch.no_grad():
        for part in owned(optimizer):
            local = locals_of[part.param]
            if local.matrices[0].kind in _EDGES:
                continue
            before = torch.empty_like(part.param.data)
            fill(before, local, model.source.checkpoint)
            main = part.states()[MAIN]
            source = before.view(-1)[part.start : part.stop].to(main.device, torch.float32)
            found[part.param] = part.start, magnitude_bits(main.float() - source)
    return found


def most_moved(
    model: ParallelModel, moved: Mapping[torch.nn.Parameter, tuple[int, Tensor]], sparsity: float
) -> dict[str, Mask]:
    """Element masks, on rank 0, that freeze floor(sparsity * n) of the n elements of all layers' weights. Collective.

    moved: see `moved_bits`. Of elements that moved equally far the first ones train, in the order of the model.
    """
    import torch
    from megatron.core import parallel_state

    from megatron_ssu.engine.device import local_device
    from megatron_ssu.models.collect import Collector
    from megatron_ssu.ops.order import kth_largest_bits

    matrices = [m for m in model.source.family.matrices(model.source.dims) if m.kind not in _EDGES]
    total = sum(matrix.elements for matrix in matrices)
    trainable = total - units_of_ratio(sparsity, total)
    if trainable == 0:
        return {m.name: Mask.constant("element", m.shape, True) for m in matrices} if model.mesh.rank == 0 else {}
    cut = kth_largest_bits([_counted(model, moved)], [trainable], None, local_device())[0]
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)

    def against_cut(local: LocalParam) -> Tensor:
        """uint8, like the shard: 0 below the cut, 1 at it, 2 above. Collective over data-parallel ranks."""
        return states[local.param]

    states = {}
    for local in model.layout:
        if local.matrices[0].kind not in _EDGES:
            whole_shard = torch.zeros(local.param.numel(), dtype=torch.uint8, device=local_device())
            if local.param in moved:
                start, bits = moved[local.param]
                whole_shard[start : start + bits.numel()] = (bits >= cut).byte() + (bits > cut).byte()
            torch.distributed.all_reduce(whole_shard, group=group)
            states[local.param] = whole_shard.view(local.param.shape)
    collect = Collector(model.layout, model.mesh, against_cut)
    wanted = ((matrix, torch.uint8) for matrix in matrices)
    found = {matrix.name: (matrix, state.numpy()) for matrix, state in collect.each(wanted)}
    return _without_ties(found, trainable) if model.mesh.rank == 0 else {}


def _counted(model: ParallelModel, moved: Mapping[torch.nn.Parameter, tuple[int, Tensor]]) -> Callable[[], Tensor]:
    """What this rank counts of all elements: no weight twice that tensor-parallel ranks share."""
    import torch
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

    from megatron_ssu.engine.device import local_device

    parts = [bits for param, (_, bits) in moved.items() if param_is_not_tensor_parallel_duplicate(param)]
    nothing = torch.empty(0, dtype=torch.int32, device=local_device())
    return lambda: torch.cat([nothing, *parts])


def _without_ties(found: Mapping[str, tuple[Matrix, np.ndarray]], trainable: int) -> dict[str, Mask]:
    """Masks that leave exactly `trainable` elements open: those above the cut, then of those at it the first."""
    left = trainable - sum(int(np.count_nonzero(state == 2)) for _, state in found.values())
    masks = {}
    for name, (matrix, state) in found.items():
        frozen = (state < 2).reshape(-1)
        tied = np.flatnonzero(state.reshape(-1) == 1)[:left]
        frozen[tied] = False
        left -= tied.size
        masks[name] = Mask.of("element", matrix.shape, frozen)
    return masks


def _facts(run: RunConfig, train_digests: Sequence[str]) -> dict[str, Any]:
    """By run-file key, as JSON: what a probe's steps follow from, beside the model and the method's options."""
    own = tuple(f"train.optimizer.{key}" for key in _OF_THE_PROBE)
    facts = {key: value for key, value in training_facts(run, train_digests).items() if key not in own}
    return {"precision.dtype": run.precision.dtype, **facts}


def _compare(path: Path, shield: Shield, facts: Mapping[str, Any]) -> None:
    """Raises UserError where the probe that made the shield trained on other data, or otherwise, than one would now."""
    saved = shield.plan.get(_TRAINED_ON, {})
    for key in sorted(facts.keys() | saved.keys()):
        if key in facts or key != DOCUMENTS:
            was, now = saved.get(key), facts.get(key)
            if was != now:
                raise UserError(
                    f"{path}: {key} was {shown(was)} when its probe ran and is {shown(now)} now; change it back, or choose "
                    "another checkpoint.directory"
                )


def _words(plan: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in plan.items())
