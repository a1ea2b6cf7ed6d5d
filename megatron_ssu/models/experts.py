"""Which layers of a model have experts, how many and how large, out of a config that transformers has read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_ssu.errors import UserError
from megatron_ssu.models.attention import declared


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture-of-experts model; every expert is a gated MLP."""

    count: int  # in a layer
    active: int  # of them a token goes through
    ffn: int
    layers: tuple[bool, ...]  # whether each layer has experts; the others have one MLP for all tokens

    @property
    def share(self) -> float:
        """Fraction of a layer's experts that a token goes through."""
        return self.active / self.count


def experts_of(config: Any) -> Experts | None:
    """The experts of transformers' `config`; None for a model without.

    Raises UserError for numbers of experts that no model can have.
    """
    count = declared(config, "num_local_experts") or declared(config, "num_experts")
    if not count:
        return None
    active, layers = config.num_experts_per_tok, config.num_hidden_layers
    if not 1 <= active <= count:
        raise UserError(
            f"config.json: num_experts_per_tok must be from 1 to the {count} experts of a layer, got {active}"
        )
    step, dense = declared(config, "decoder_sparse_step") or 1, declared(config, "mlp_only_layers") or ()
    sparse = tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))
    return Experts(count, active, declared(config, "moe_intermediate_size") or config.intermediate_size, sparse)
