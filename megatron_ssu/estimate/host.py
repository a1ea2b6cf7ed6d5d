"""Host memory and disk that checkpoints, import and export take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_ssu.estimate.step_time import GPUS_PER_NODE, Mesh
from megatron_ssu.estimate.weights import Parameter, Shards
from megatron_ssu.models import collect, hf_export, hf_import
from megatron_ssu.models.family import Dims, Family

STATE = 12  # bytes of main weight and moments per stored element


@dataclass(frozen=True)
class HostBytes:
    """Bytes; those of host memory on the fullest node, beside the process, its libraries and the system's cache."""

    ranks: int  # on a node
    saving: int  # copies that are being written
    loading: int  # stored state, before it is copied to the device
    background: bool  # training continues while `saving` is held
    stored: int  # a checkpoint on disk
    importing: int  # at most: parts of tensors on their way to the device
    exporting: int  # at most: portions of the files that the node's ranks write
    files: int  # of an export
    writers: int  # ranks that write them


def host_bytes(
    mesh: Mesh,
    parameters: Callable[[int], Sequence[Parameter]],
    copied: Callable[[int, Parameter], bool],
    weight: int,
    shards: Shards,
    *,
    background: bool,
    files: int,
) -> HostBytes:
    """Count what the ranks of a node hold.

    Weights are stored whole, and compact parameters not at all. Main weight and moments are stored for the trainable columns
    and rows of a shielded matrix, for all elements of one that is shielded by element, and for a weight that trains whole.
    Every data-parallel rank saves and loads one part of the state, and writes one part of the weights.

    Args:
        parameters: those of a rank of a pipeline stage.
        copied: whether a stage's parameter is a copy of another stage's, which stores it.
        weight: bytes per element of a weight.
        shards: parts that the ranks with the same weights divide them into.
        files: of an export, which are spread over the ranks.
    """
    saving: list[float] = []
    loading: list[float] = []
    for stage in range(mesh.pipeline):
        found = parameters(stage)
        for tensor in range(mesh.tensor):
            # Norms that all tensor-parallel ranks hold are stored by the first.
            own = [p for p in found if (p.split or p.expert or tensor == 0) and not copied(stage, p)]
            saving.append(sum((STATE * p.stored + weight * p.elements) / shards.of(p) for p in own))
            loading.append(STATE * sum(p.stored / shards.of(p) for p in found))
    total = sum(saving) * mesh.data
    # Tensor-parallel ranks are neighbours, then data-parallel ones, then stages.
    places = [t + mesh.tensor * s for s in range(mesh.pipeline) for _ in range(mesh.data) for t in range(mesh.tensor)]
    nodes = [places[first : first + GPUS_PER_NODE] for first in range(0, len(places), GPUS_PER_NODE)]
    writers = hf_export.spread(range(mesh.world), files)
    on_node = max(Counter(rank // GPUS_PER_NODE for rank in writers).values())
    largest = max(p.elements for stage in range(mesh.pipeline) for p in parameters(stage)) * weight
    return HostBytes(
        len(nodes[0]),
        round(max(sum(saving[place] for place in node) for node in nodes)),
        round(max(sum(loading[place] for place in node) for node in nodes)),
        background,
        round(total),
        len(nodes[0]) * min(hf_import.PORTION, round(largest)),
        on_node * hf_export.PORTIONS_HELD * collect.PORTION,
        files,
        len(writers),
    )


def exported_files(family: Family, dims: Dims, dtype: str, max_shard_size: int) -> int:
    """Files of the model's export with every tensor in `dtype` ('BF16', 'F32')."""
    return len(hf_export.plan_files(hf_export.plan_tensors(family, dims, lambda name: dtype), max_shard_size))
