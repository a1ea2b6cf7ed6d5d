"""Layer freezing: whole layers stay as they are; or, as Spectrum chooses them, whole matrices.

The options stand for keys of the shield section: a score, a granularity and a fraction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from megatron_ssu.config.schema import ProtectSection
from megatron_ssu.errors import UserError
from megatron_ssu.methods.ssu import SourceShieldedUpdates
from megatron_ssu.models.hf_config import read_hf_config
from megatron_ssu.shield.budget import check_ratio, units_of_ratio

if TYPE_CHECKING:
    from megatron_ssu.config.schema import RunConfig
    from megatron_ssu.models.matrix import Matrix


@dataclass(frozen=True)
class LayerOptions:
    """Options of layer freezing."""

    # first, last, random layers; those whose weights changed most since `before`; or within each kind of matrix those with the
    # lowest signal-to-noise ratio (Spectrum, arXiv 2406.06623)
    choose: Literal["first", "last", "random", "changed", "spectrum"] = "first"
    fraction: float = 0.5  # of the layers, or matrices, that are frozen
    before: str | None = None  # the Hugging Face directory that `changed` compares the model with
    special_tokens: bool = False  # freeze the chat template's special-token rows of embedding and head too
    seed: int = 1234  # of `random`


class LayerFreezing(SourceShieldedUpdates):
    """A planned shield of whole layers."""

    name: ClassVar[str] = "layers"
    summary: ClassVar[str] = "layer freezing"
    Options: ClassVar[type] = LayerOptions

    def decides(self, run: RunConfig) -> dict[str, Any]:
        options = self.options
        common: dict[str, Any] = {"ratio": options.fraction, "special_tokens": options.special_tokens}
        if options.choose == "random":
            return {**common, "score": "random", "granularity": "layer", "seed": options.seed}
        if options.choose == "changed":
            return {**common, "score": "change", "granularity": "layer", "change_from": options.before}
        if options.choose == "spectrum":
            return {**common, "score": "snr", "granularity": "matrix", "freeze": "lowest"}
        return {**common, "ratio": 0.0, "score": "random", "granularity": "layer", "protect": self._ends(run)}

    def identity(self) -> dict[str, Any]:
        return asdict(self.options)

    def _ends(self, run: RunConfig) -> list[ProtectSection]:
        """A rule for the first or last floor(fraction * L) of the model's L layers."""
        check_ratio(self.options.fraction, "method.layers.fraction")
        layers = read_hf_config(run.model.hf_path or run.model.path).get("num_hidden_layers")
        if not isinstance(layers, int):
            return []  # config.json is refused where its sizes are checked
        count = units_of_ratio(self.options.fraction, layers)
        if count == 0:
            return []
        first = 0 if self.options.choose == "first" else layers - count
        return [ProtectSection(f"layers:{first}-{first + count - 1}", "frozen")]

    def validate(self, run: RunConfig, matrices: Sequence[Matrix]) -> None:
        options = self.options
        check_ratio(options.fraction, "method.layers.fraction")
        if options.choose == "changed" and options.before is None:
            raise UserError(
                "method.layers.before: must name a Hugging Face directory where choose is changed, got null"
            )
        if options.choose != "changed" and options.before is not None:
            raise UserError(f"method.layers.before: does not go with choose: {options.choose}; leave it out")
        super().validate(run, matrices)
