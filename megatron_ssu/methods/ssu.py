"""Source-Shielded Updates (arXiv 2512.04844): score on source samples, freeze the best columns of every matrix.

Its options are the section `shield`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_ssu.methods.base import Job, Method

if TYPE_CHECKING:
    from megatron_ssu.config.schema import RunConfig
    from megatron_ssu.models.family import Dims
    from megatron_ssu.models.matrix import Matrix
    from megatron_ssu.models.source import Source
    from megatron_ssu.shield.mask import Granularity
    from megatron_ssu.shield.shield_file import Shield


class SourceShieldedUpdates(Method):
    """A shield that is planned from scores before the first step and stays."""

    name: ClassVar[str] = "ssu"
    summary: ClassVar[str] = "Source-Shielded Updates"
    shields: ClassVar[bool] = True

    @property
    def planned(self) -> bool:
        return True

    def validate(self, run: RunConfig, matrices: Sequence[Matrix]) -> None:
        from megatron_ssu.methods.options import check_rules
        from megatron_ssu.methods.shield_checks import validate_shield

        validate_shield(run)
        check_rules(run, matrices)

    def validate_files(self, run: RunConfig) -> None:
        from megatron_ssu.methods.shield_checks import validate_shield_files

        validate_shield_files(run)

    def check_counted(self, run: RunConfig, shield: Shield) -> None:
        from megatron_ssu.methods.planned import check_choices

        if run.shield.file is None:
            check_choices(run, shield)

    def check(self, run: RunConfig, source: Source, *, begun: bool) -> None:
        from megatron_ssu.methods.scored import needs_scoring

        needs_scoring(run, source, begun=begun)

    def present_shield(self, run: RunConfig, source: Source) -> Shield | None:
        from megatron_ssu.methods.scored import present_shield

        return present_shield(run, source)

    def prepare(self, job: Job) -> Shield | None:
        from megatron_ssu.methods.scored import make_shield

        return make_shield(job.model, begun=job.begun)

    def identity(self) -> dict[str, Any]:
        return {}  # the shield says it all

    def expected_shield(
        self, run: RunConfig, matrices: Sequence[Matrix], dims: Dims
    ) -> Mapping[str, tuple[Granularity, float]]:
        from megatron_ssu.methods.options import expected_fractions

        return expected_fractions(run, matrices, dims)
