"""Methods whose shield follows from their options and the model's shapes: a rule or a draw, no score and no weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_ssu.methods.base import Job, Method
from megatron_ssu.methods.shield_place import check_same, kept_shield, own_shield
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.shield.mask import Granularity, Mask
from megatron_ssu.shield.shield_file import Shield

if TYPE_CHECKING:
    from megatron_ssu.config.schema import RunConfig
    from megatron_ssu.models.family import Dims
    from megatron_ssu.models.matrix import Matrix
    from megatron_ssu.models.source import Source


class DrawnShield(Method):
    """Base of these methods: they override `draw`."""

    shields: ClassVar[bool] = True

    def draw(self, matrices: Sequence[Matrix], dims: Dims) -> dict[str, Mask]:
        """The masks by matrix name; matrices that are left out train. Raises UserError for options that do not fit."""
        raise NotImplementedError

    def masks(self, run: RunConfig, source: Source) -> dict[str, Mask]:
        """The masks of a run's model."""
        return self.draw(list(source.family.matrices(source.dims)), source.dims)

    def check(self, run: RunConfig, source: Source, *, begun: bool) -> None:
        check_same(run, self._shield(run, source))

    def present_shield(self, run: RunConfig, source: Source) -> Shield | None:
        self.check(run, source, begun=True)
        return self._shield(run, source)

    def prepare(self, job: Job) -> Shield | None:
        from megatron_ssu.engine.ranks import on_all_ranks, on_rank_zero

        run, source = job.model.run, job.model.source
        on_rank_zero(lambda: kept_shield(run, self._shield(run, source)))
        return on_all_ranks(lambda: own_shield(run, source))

    def expected_shield(
        self, run: RunConfig, matrices: Sequence[Matrix], dims: Dims
    ) -> Mapping[str, tuple[Granularity, float]]:
        masks = self.draw(matrices, dims)
        return {name: (mask.granularity, mask.frozen_units / max(1, mask.units)) for name, mask in masks.items()}

    def _shield(self, run: RunConfig, source: Source) -> Shield:
        masks = self.masks(run, source)
        return shield_of(self.name, source, masks, asdict(self.options))


def shield_of(method: str, source: Source, masks: dict[str, Mask], plan: dict[str, Any]) -> Shield:
    """A shield of these masks that no score was asked for; `plan`: what they follow from.

    Linear weights without a mask are in it too, with nothing frozen, so that its totals are those of the model.
    """
    linear = source.family.linear_matrices(source.dims)
    masks = {m.name: Mask.constant("column", m.shape, False) for m in linear} | masks
    matrices = {m.name: m for m in source.family.matrices(source.dims) if m.name in masks}
    return Shield(
        method=method,
        model=source.name,
        fingerprint=model_fingerprint(source.path),
        matrices={name: matrices[name] for name in sorted(matrices)},
        masks={name: masks[name] for name in sorted(masks)},
        plan=plan,
    )


def whole(matrix: Matrix) -> Mask:
    """A mask that freezes all of a matrix, or norm."""
    granularity: Granularity = "element" if len(matrix.shape) == 1 else "column"
    if matrix.kind in ("embedding", "head"):
        granularity = "row"
    return Mask.constant(granularity, matrix.shape, True)
