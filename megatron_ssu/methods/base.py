"""What a method is: which weights train, and what happens to their gradients.

A method is one class in one file, listed in registry.py. The class here is full fine-tuning with a stock trainer; every method
overrides what it changes. A run calls, in this order:

    validate, validate_files   on every rank, before anything: what follows from the run file and config.json; its files
    check       on rank 0, before data is tokenized and the model loaded: what is there already
    prepare     collective, with the model loaded: the run's shield, which is in a file when this returns
    attach      before DDP wraps the model: compact parameters, frozen flags, adapters
    after_backward, on_gradients   in every step
    before_export, export_files    when the weights are written as a Hugging Face directory

Modules of methods import neither torch nor megatron-core when they are loaded: run files are read with them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_ssu.compact.parameters import CompactParameters
    from megatron_ssu.config.schema import RunConfig
    from megatron_ssu.engine.linear import Gemm
    from megatron_ssu.engine.optimizer import Owned
    from megatron_ssu.models.family import Dims
    from megatron_ssu.models.matrix import Matrix
    from megatron_ssu.models.parallel_model import ParallelModel
    from megatron_ssu.models.source import Source
    from megatron_ssu.shield.mask import Granularity
    from megatron_ssu.shield.shield_file import Shield


@dataclass(frozen=True)
class NoOptions:
    """Options of a method that has none."""


@dataclass
class Job:
    """What a method has to prepare with.

    `probe(model, iterations, optimizer)` trains all weights of the model for so many steps on the run's training data, with
    `optimizer` in place of train.optimizer and a constant learning rate, and returns the trainer, whose `release()` frees
    all that the probe took. Raises TrainingStopped where a loss or gradient is not finite.
    `fresh()` gives the model anew, with the source's weights.
    """

    model: ParallelModel
    begun: bool  # there is a checkpoint to resume from: its shield stays
    probe: Callable[[ParallelModel, int, dict[str, Any]], Any]
    fresh: Callable[[], ParallelModel]
    train_digests: Sequence[str] = ()  # of the training data's indexed datasets

    def rebuild(self) -> None:
        """Replace the model, and what has trained it, by the source model; nothing else may hold on to it. Collective."""
        del self.model
        gc.collect()  # chunks, DDP and optimizer refer to each other
        self.model = self.fresh()


class Method:
    """Full fine-tuning: everything trains, nothing else happens."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "full fine-tuning"
    Options: ClassVar[type] = NoOptions
    shields: ClassVar[bool] = False  # whether weights may be frozen in part, and have compact parameters then
    adapts: ClassVar[bool] = (
        False  # whether adapters beside the weights train, which are frozen whatever the shield says
    )

    experts: ClassVar[bool] = True  # whether it goes with layers of experts

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options

    @property
    def planned(self) -> bool:
        """Whether the `plan` command can make a shield for it from scores."""
        return False

    @property
    def probe_iterations(self) -> int:
        """Steps that `prepare` trains on the run's training data; they may be more than the run's."""
        return 0

    def decides(self, run: RunConfig) -> dict[str, Any]:
        """Keys of the shield section that the method's own options stand for, with their values."""
        return {}

    def validate(self, run: RunConfig, matrices: Sequence[Matrix]) -> None:
        """Check options against the model's matrices. Raises UserError."""
        from megatron_ssu.methods.shield_place import refuse_given_files

        refuse_given_files(run)

    def validate_files(self, run: RunConfig) -> None:
        """Check that the files that the method will read are there. Raises UserError."""

    def check_counted(self, run: RunConfig, shield: Shield) -> None:
        """Raises UserError where a shield file in the run's directory is not what the run file asks for now.

        Weights and scores are not read, so it may still be another model's.
        """
        from megatron_ssu.methods.shield_place import check_plan

        check_plan(shield.label, shield, self.name, self.identity())

    def describe(self, shield: Shield) -> str:
        """What trains, for the log's first line."""
        linear = shield.realised()["linear"]
        return f"{linear['ratio']:.2%} of its linear weights frozen" if shield.masks else "nothing frozen"

    def check(self, run: RunConfig, source: Source, *, begun: bool) -> None:
        """Raises UserError where what is there already does not fit the run file. Makes nothing."""

    def present_shield(self, run: RunConfig, source: Source) -> Shield | None:
        """The shield of a run that has begun, without the model's weights; None where it takes a model to make it."""
        return nothing_frozen(self.name, source)

    def prepare(self, job: Job) -> Shield | None:
        """The shield that training starts with, read from its file; None where nothing is frozen. Collective.

        Raises UserError on all ranks alike, also where the shield of a run that has begun would come out another.
        """
        return None

    def attach(self, model: ParallelModel, shield: Shield, gemm: Gemm | None) -> CompactParameters:
        """Set up what trains, before DDP wraps the chunks. `gemm`: see CompactParameters."""
        from megatron_ssu.compact.parameters import CompactParameters

        return CompactParameters(model.chunks, model.layout, shield, gemm=gemm)

    def after_backward(self, chunk: int) -> None:
        """A micro-batch's backward pass through this rank's chunk of that number has ended.

        Gradients so far are in `main_grad` of the parameters, not reduced yet.
        """

    def on_gradients(self, gradients: Iterable[tuple[Owned, Tensor]]) -> None:
        """Change reduced gradients in place, before their norm: fp32, each of the range that this rank owns. Collective."""

    def before_export(self, model: ParallelModel) -> None:
        """The weights are about to be exported; training is over."""

    def export_files(self, model: ParallelModel, folder: Path) -> None:
        """Write further files of an export into `folder`, which rank 0 has. Collective."""

    def identity(self) -> dict[str, Any]:
        """Facts that must be the same on resume, beside the shield: by name within `method.<name>`."""
        return asdict(self.options)

    def sharded_state(self, model: ParallelModel) -> dict[str, Any]:
        """What checkpoints hold beside the model's weights: megatron's ShardedTensors, which are loaded in place."""
        return {}

    def expected_shield(
        self, run: RunConfig, matrices: Sequence[Matrix], dims: Dims
    ) -> Mapping[str, tuple[Granularity, float]]:
        """By matrix: granularity and fraction that will be frozen, as far as it is known before there is a shield."""
        return {}

    def added_elements(self, matrix: Matrix, split: int | None, tensor: int) -> int:
        """Elements of the parameters that the method puts beside a matrix, on one of `tensor` ranks.

        `split`: the dimension of the matrix that they divide.
        """
        return 0


def nothing_frozen(method: str, source: Source) -> Shield:
    """The shield of a method that freezes nothing."""
    from megatron_ssu.models.fingerprint import model_fingerprint
    from megatron_ssu.shield.shield_file import Shield

    return Shield(method, source.name, model_fingerprint(source.path), matrices={}, masks={})
