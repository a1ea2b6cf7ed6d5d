"""Which weights a run with adapters leaves as they are, as a shield."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron_ssu.adapters.settings import AdapterSettings
from megatron_ssu.errors import UserError
from megatron_ssu.models.matrix import Matrix
from megatron_ssu.shield.mask import Granularity, Mask
from megatron_ssu.shield.shield_file import Shield

WHOLE = ("embedding", "head")  # what trains as a whole beside adapters, where it is asked for


def adapter_shield(
    matrices: Iterable[Matrix],
    settings: AdapterSettings,
    *,
    model: str,
    fingerprint: str,
    embeddings: bool = False,
    base: Shield | None = None,
    plan: dict[str, Any] | None = None,
) -> Shield:
    """What merging the adapters never changes: every matrix without an adapter, frozen whole.

    Matrices that train are in it as well, with a mask that freezes nothing, so that `verify` reports how they moved.

    Args:
        matrices: all of the model's.
        model, fingerprint: as in a shield.
        embeddings: embedding and head train as a whole.
        base: a shield whose frozen elements the adapters leave alone: it says what is frozen of what trains.
        plan: what the shield follows from.
    """
    found = {m.name: m for m in matrices}
    masks = {}
    for name, matrix in found.items():
        if matrix.kind in settings.targets or (embeddings and matrix.kind in WHOLE):
            masks[name] = base.masks[name] if base is not None and name in base.masks else whole(matrix, frozen=False)
        else:
            masks[name] = whole(matrix, frozen=True)
    return Shield(
        "lora",
        model,
        fingerprint,
        matrices={name: found[name] for name in sorted(masks)},
        masks={name: masks[name] for name in sorted(masks)},
        plan=plan or {},
        granularity=base.granularity if base is not None else "column",
    )


def with_frozen_bases(shield: Shield, matrices: Iterable[Matrix], settings: AdapterSettings) -> Shield:
    """`shield` with the weights below the adapters frozen whole: what the optimizer may know beside the adapters."""
    masks, named = dict(shield.masks), dict(shield.matrices)
    for matrix in matrices:
        if matrix.kind in settings.targets:
            masks[matrix.name], named[matrix.name] = whole(matrix, frozen=True), matrix
    return Shield(shield.method, shield.model, shield.fingerprint, matrices=named, masks=masks)


def whole(matrix: Matrix, *, frozen: bool) -> Mask:
    """A mask that freezes all of a matrix, or nothing of it."""
    granularity: Granularity = "element" if len(matrix.shape) == 1 else "column"
    if matrix.kind in WHOLE:
        granularity = "row"
    return Mask.constant(granularity, matrix.shape, frozen)


def check_base(base: Shield, matrices: Iterable[Matrix], settings: AdapterSettings) -> None:
    """Raises UserError where adapters cannot leave alone what `base` freezes."""
    for matrix in matrices:
        count = base.counts.get(matrix.name, 0)
        if matrix.kind not in settings.targets or count in (0, matrix.elements):
            continue
        granularity = base.masks[matrix.name].granularity
        if granularity not in ("column", "row"):
            raise UserError(
                f"{base.label}: {matrix.name} must be frozen by column or row with method.lora.shielded: true, got by "
                f"{granularity}; plan another shield"
            )
