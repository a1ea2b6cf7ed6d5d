"""Adapters on a rank's model chunks: LoRA and DoRA for the logical matrices of the linear layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_ssu.adapters.layer import AdaptedLinear
from megatron_ssu.adapters.matrix import AdaptedMatrix, Part
from megatron_ssu.adapters.settings import AdapterSettings
from megatron_ssu.models.collect import PieceCollector
from megatron_ssu.models.parallel_model import ParallelModel
from megatron_ssu.shield.shield_file import Shield


class Adapters:
    """The adapted linear layers of this rank."""

    def __init__(self, model: ParallelModel, settings: AdapterSettings, layers: list[AdaptedLinear]) -> None:
        self.model, self.settings, self.layers = model, settings, layers

    def parts(self) -> Iterator[Part]:
        """All tensors of this rank's adapters."""
        return (part for layer in self.layers for matrix in layer.matrices for part in matrix.parts())

    def changed(self) -> None:
        """To be called when the adapters have been updated or loaded: DoRA's norms are computed once after each change."""
        for layer in self.layers:
            layer.changed()

    def sharded_state(self) -> dict[str, ShardedTensor]:
        """The adapters as dist_checkpointing takes them, by name; loading writes into the parameters.

        Raises RuntimeError after `merge`: beside merged weights they would be applied twice.
        """
        if any(layer.merged for layer in self.layers):
            raise RuntimeError("merged weights are no base of adapters; save before merging")
        return {part.matrix.name: part.sharded() for part in self.parts()}

    def merge(self) -> None:
        """Write W' of every adapted matrix into its weight, computed in fp32 and rounded once; the layers then run without
        adapters. Communicates for DoRA alone."""
        for layer in self.layers:
            layer.merge()

    def peft_tensors(self) -> dict[str, torch.Tensor]:
        """The adapters under PEFT's names, whole, on rank 0's CPU; empty on the other ranks. Collective."""
        mesh = self.model.mesh
        mine = (part for part in self.parts() if part.split or mesh.tensor_rank == 0)
        collect = PieceCollector({part.matrix.name: (part.param.detach, part.piece) for part in mine}, mesh)
        dtype = self.model.config.params_dtype
        wanted = [(m, torch.float32 if len(m.shape) == 1 else dtype) for m in collect.matrices]
        found = {peft_name(matrix.name): whole for matrix, whole in collect.each(wanted)}
        return found if mesh.rank == 0 else {}


def peft_name(name: str) -> str:
    """The name in a PEFT directory of the adapter tensor `name`."""
    return f"base_model.model.{name}" + ("" if name.endswith("magnitude_vector") else ".weight")


def add_adapters(model: ParallelModel, settings: AdapterSettings, shield: Shield | None = None) -> Adapters:
    """Adapters that change nothing yet on the model's linear layers, whose weights then ask for no gradient; before DDP.

    Args:
        model: with its weights loaded: DoRA's magnitudes are their row norms. Without, they are to be loaded.
        settings: the same on all ranks.
        shield: by column or row; matrices that it freezes whole get no adapter, and those that it freezes in part an adapter
            that acts on the rest.
    """
    owners = {p: m for chunk in model.chunks for m in chunk.modules() for p in m.parameters(recurse=False)}
    sequence_parallel = model.config.sequence_parallel and model.mesh.tensor > 1
    layers = []
    for local in model.layout:
        matrices = []
        for piece in local.pieces:
            name = piece.matrix.name
            if piece.matrix.kind not in settings.targets or (
                shield is not None and shield.counts.get(name) == piece.matrix.elements
            ):
                continue
            mask = shield.masks[name] if shield is not None and name in shield.masks else None
            matrices.append(AdaptedMatrix.of(local, piece, settings, mask, sequence_parallel=sequence_parallel))
        if matrices:
            local.param.requires_grad_(False)
            layers.append(
                AdaptedLinear(owners[local.param], local, matrices, settings.scale, sequence_parallel=sequence_parallel)
            )
    return Adapters(model, settings, layers)
