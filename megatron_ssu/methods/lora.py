"""LoRA and DoRA: adapters train on the linear layers, whose weights stay; an export has them merged, and as a PEFT directory.

Its shield says what merging never changes: every matrix without an adapter. With `shielded` the adapters act beside an SSU
shield: on trainable columns, or rows, of every matrix alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_ssu.adapters.settings import TARGETS, AdapterSettings
from megatron_ssu.errors import UserError
from megatron_ssu.methods.base import Job, Method
from megatron_ssu.methods.shield_place import NAME, check_same, kept_shield, own_shield, refuse_given_files

if TYPE_CHECKING:
    from megatron_ssu.adapters.adapters import Adapters
    from megatron_ssu.compact.parameters import CompactParameters
    from megatron_ssu.config.schema import RunConfig
    from megatron_ssu.engine.linear import Gemm
    from megatron_ssu.models.family import Dims
    from megatron_ssu.models.matrix import Matrix
    from megatron_ssu.models.parallel_model import ParallelModel
    from megatron_ssu.models.source import Source
    from megatron_ssu.shield.mask import Granularity
    from megatron_ssu.shield.shield_file import Shield

BESIDE_SSU = "lora-shield.safetensors"
PEFT_FOLDER = "adapter"  # in an export: beside the merged weights transformers would load it on top of them


@dataclass(frozen=True)
class LoraOptions:
    """The section method.lora; see AdapterSettings."""

    rank: int = 32
    alpha: float = 32.0
    targets: list[str] = field(default_factory=lambda: list(TARGETS))  # kinds of matrices that have adapters
    dora: bool = False
    rslora: bool = False  # scale alpha / sqrt(rank) in place of alpha / rank
    embeddings: bool = False  # embedding and head train as a whole
    shielded: bool = False  # leave alone what the shield section freezes
    seed: int = 1234  # of A's random start

    def settings(self) -> AdapterSettings:
        """What the adapters are."""
        chosen = tuple(kind for kind in TARGETS if kind in self.targets)
        return AdapterSettings(self.rank, self.alpha, chosen, self.dora, self.rslora, self.seed)


class LowRankAdaptation(Method):
    """Adapters of one rank for all linear weights of the chosen kinds."""

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "low-rank adapters"
    Options: ClassVar[type] = LoraOptions
    adapts: ClassVar[bool] = True
    shields: ClassVar[bool] = True
    experts: ClassVar[bool] = False

    def __init__(self, options: LoraOptions | None = None) -> None:
        super().__init__(options)
        self.options: LoraOptions
        self.settings = self.options.settings()
        self._adapters: Adapters | None = None

    @property
    def planned(self) -> bool:
        shielded: bool = self.options.shielded
        return shielded

    def validate(self, run: RunConfig, matrices: Sequence[Matrix]) -> None:
        _check_options(self.options, matrices)
        if not self.options.shielded:
            refuse_given_files(run)
            return
        from megatron_ssu.methods.options import check_rules
        from megatron_ssu.methods.shield_checks import validate_shield

        if self.options.dora:
            raise UserError(
                "method.lora.dora: must be false with method.lora.shielded: true, got true; DoRA scales whole rows, frozen "
                "elements as well"
            )
        if run.shield.file is None and run.shield.granularity == "element":
            raise UserError(
                "shield.granularity: must be column or row with method.lora.shielded: true, got 'element'; adapters change "
                "whole columns or rows"
            )
        validate_shield(run)
        check_rules(run, matrices)

    def validate_files(self, run: RunConfig) -> None:
        if self.options.shielded:
            from megatron_ssu.methods.shield_checks import validate_shield_files

            validate_shield_files(run)

    def describe(self, shield: Shield) -> str:
        beside = f", {super().describe(shield)}" if self.options.shielded else ""
        kind = "DoRA" if self.options.dora else "LoRA"
        return f"{kind} of rank {self.options.rank} on {', '.join(self.settings.targets)}{beside}"

    def check(self, run: RunConfig, source: Source, *, begun: bool) -> None:
        if not self.options.shielded:
            check_same(run, self._own_shield(source, None))
            return
        from megatron_ssu.methods.scored import needs_scoring
        from megatron_ssu.shield.shield_file import load_shield

        needs_scoring(run, source, begun=begun)
        if run.shield.file is not None:
            self._check_base(load_shield(run.shield.file), source)

    def present_shield(self, run: RunConfig, source: Source) -> Shield | None:
        if not self.options.shielded:
            check_same(run, self._own_shield(source, None))
            return self._own_shield(source, None)
        from megatron_ssu.methods.scored import present_shield

        base = present_shield(run, source)
        return None if base is None else self._own_shield(source, base)

    def prepare(self, job: Job) -> Shield | None:
        from megatron_ssu.engine.ranks import on_all_ranks, on_rank_zero
        from megatron_ssu.methods.scored import make_shield

        run, source = job.model.run, job.model.source
        base = make_shield(job.model, begun=job.begun) if self.options.shielded else None

        def write() -> None:
            if base is not None:
                self._check_base(base, source)
            kept_shield(run, self._own_shield(source, base), self._file)

        on_rank_zero(write)
        return on_all_ranks(lambda: own_shield(run, source, self._file))

    def attach(self, model: ParallelModel, shield: Shield, gemm: Gemm | None) -> CompactParameters:
        from megatron_ssu.adapters.adapters import add_adapters
        from megatron_ssu.adapters.freeze import with_frozen_bases
        from megatron_ssu.compact.parameters import CompactParameters

        self._adapters = add_adapters(model, self.settings, shield)
        matrices = model.source.family.matrices(model.source.dims)
        rest = with_frozen_bases(shield, matrices, self.settings)
        compact = CompactParameters(model.chunks, model.layout, rest, gemm=gemm)
        compact.when_changed(self._adapters.changed)
        return compact

    def before_export(self, model: ParallelModel) -> None:
        self._adapters_of(model).merge()

    def export_files(self, model: ParallelModel, folder: Path) -> None:
        from megatron_ssu.adapters.freeze import WHOLE
        from megatron_ssu.adapters.peft_files import write_peft

        write_peft(self._adapters_of(model), folder / PEFT_FOLDER, whole=WHOLE if self.options.embeddings else ())

    def sharded_state(self, model: ParallelModel) -> dict[str, Any]:
        return self._adapters_of(model).sharded_state()

    def expected_shield(
        self, run: RunConfig, matrices: Sequence[Matrix], dims: Dims
    ) -> Mapping[str, tuple[Granularity, float]]:
        from megatron_ssu.adapters.freeze import WHOLE, whole

        trains = WHOLE if self.options.embeddings else ()
        return {m.name: (whole(m, frozen=True).granularity, 1.0) for m in matrices if m.kind not in trains}

    def added_elements(self, matrix: Matrix, split: int | None, tensor: int) -> int:
        if matrix.kind not in self.settings.targets:
            return 0
        rows, columns = matrix.shape[0], matrix.shape[1]
        by_row, by_column = (tensor if split == dim else 1 for dim in (0, 1))
        outputs = rows // by_row
        elements: int = self.settings.rank * (columns // by_column + outputs)
        return elements + (outputs if self.settings.dora else 0)

    def _adapters_of(self, model: ParallelModel) -> Adapters:
        """Those of `attach`; a model that is only exported gets new ones, to be loaded. Collective then."""
        if self._adapters is None:
            from megatron_ssu.adapters.adapters import add_adapters
            from megatron_ssu.engine.ranks import on_all_ranks

            shield = None
            if self.options.shielded:
                shield = on_all_ranks(lambda: own_shield(model.run, model.source, self._file))
            self._adapters = add_adapters(model, self.settings, shield)
        return self._adapters

    @property
    def _file(self) -> str:
        """The name of the run's shield file: beside an SSU shield one of its own."""
        return BESIDE_SSU if self.options.shielded else NAME

    def _own_shield(self, source: Source, base: Shield | None) -> Shield:
        from megatron_ssu.adapters.freeze import adapter_shield
        from megatron_ssu.models.fingerprint import model_fingerprint

        return adapter_shield(
            source.family.matrices(source.dims),
            self.settings,
            model=source.name,
            fingerprint=model_fingerprint(source.path),
            embeddings=self.options.embeddings,
            base=base,
            plan=asdict(self.options),
        )

    def _check_base(self, base: Shield, source: Source) -> None:
        from megatron_ssu.adapters.freeze import check_base

        check_base(base, list(source.family.matrices(source.dims)), self.settings)


def _check_options(options: LoraOptions, matrices: Sequence[Matrix]) -> None:
    from megatron_ssu.config.checks.values import at_least

    at_least("method.lora.rank", options.rank, 1)
    at_least("method.lora.seed", options.seed, 0)
    if not options.alpha > 0:
        raise UserError(f"method.lora.alpha: must be above 0, got {options.alpha}; the rank is usual")
    unknown = [kind for kind in options.targets if kind not in TARGETS]
    if unknown or not options.targets:
        got = repr(unknown[0]) if unknown else "none"
        raise UserError(f"method.lora.targets: must be some of {', '.join(TARGETS)}, got {got}; leave it out for all")
    smallest = min(size for m in matrices if m.kind in options.targets for size in m.shape)
    if options.rank > smallest:
        raise UserError(
            f"method.lora.rank: must be at most {smallest}, the smallest dimension of a target, got {options.rank}"
        )
