"""Methods whose shield is made before the first step and stays: SSU, and full fine-tuning, which shields nothing."""

from __future__ import annotations

from megatron_ssu.config.schema import RunConfig
from megatron_ssu.methods.base import register
from megatron_ssu.methods.scored import make_shield, needs_scoring, present_shield
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.parallel_model import ParallelModel
from megatron_ssu.models.source import Source
from megatron_ssu.shield.shield_file import Shield


@register("ssu")
class SourceShieldedUpdates:
    """Source-Shielded Updates (arXiv 2512.04844): score on source samples, freeze the best columns of every matrix."""

    def check(self, run: RunConfig, source: Source, *, begun: bool) -> None:
        needs_scoring(run, source, begun=begun)

    def shield(self, session: ParallelModel, *, begun: bool) -> Shield:
        return make_shield(session, begun=begun)

    def present_shield(self, run: RunConfig, source: Source) -> Shield | None:
        return present_shield(run, source)


@register("none")
class FullFineTuning:
    """Everything trains."""

    def check(self, run: RunConfig, source: Source, *, begun: bool) -> None:
        pass

    def shield(self, session: ParallelModel, *, begun: bool) -> Shield:
        return self.present_shield(session.run, session.source)

    def present_shield(self, run: RunConfig, source: Source) -> Shield:
        return Shield("none", source.name, model_fingerprint(source.path), matrices={}, masks={})
