"""The optimizer's state in checkpoints: fp32 main weights, moments and the count of steps, for any mesh.

Every data-parallel rank saves, and loads, what it owns; stored.py says where that lies. What is frozen is stored nowhere, but
for zeros in matrices that are shielded by element.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_ssu.compact.matrix import CompactMatrix
from megatron_ssu.compact.parameters import CompactParameters
from megatron_ssu.engine.optimizer import Owned, loaded, owned, set_steps, steps
from megatron_ssu.engine.ranks import gathered
from megatron_ssu.train.stored import Box, Stored, compact_boxes, replicated, stored_weights, whole_boxes

Tree = dict[str, dict[str, dict[str, ShardedTensor]]]  # number of the range -> state -> number of the box


class OptimizerState:
    """Saves and loads the state of a model's optimizer, whose moments have been made."""

    def __init__(self, optimizer: MegatronOptimizer, compact: CompactParameters) -> None:
        self.optimizer, self.compact = optimizer, compact

    @torch.no_grad()
    def to_save(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """This rank's part of a checkpoint; copies on the CPU, made one parameter at a time. Collective."""
        stored = stored_weights(model_state)
        state: Tree = {}
        for number, part in enumerate(owned(self.optimizer)):
            if self._elsewhere(part, stored):
                continue
            boxes = self._boxes(part, stored)
            if not boxes:  # nothing but padding
                continue
            state[str(number)] = {
                name: {
                    str(i): box.sharded(name, data)
                    for i, (box, data) in enumerate(zip(boxes, self._cut(part, flat, boxes), strict=True))
                }
                for name, flat in part.states().items()
            }
        # A rank without anything to update has taken no step.
        return {"steps": max(gathered(steps(self.optimizer))), "state": state}

    @torch.no_grad()
    def to_load(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """What this rank wants of a checkpoint: tensors to load into."""
        stored = stored_weights(model_state)
        state: Tree = {}
        for number, part in enumerate(owned(self.optimizer)):
            boxes = self._boxes(part, stored)
            state[str(number)] = {
                name: {str(i): box.sharded(name, torch.empty(box.elements)) for i, box in enumerate(boxes)}
                for name in part.states()
            }
        return {"state": state}

    @torch.no_grad()
    def load(self, found: dict[str, Any], model_state: dict[str, Any]) -> None:
        """Take over what was loaded into `to_load`; `found` is emptied."""
        stored = stored_weights(model_state)
        tree = found.get("state", {})  # without one where this rank wants nothing
        for number, part in enumerate(owned(self.optimizer)):
            tensors, boxes = tree.pop(str(number), {}), self._boxes(part, stored)
            states = {}
            for name, flat in part.states().items():
                parts = tensors.pop(name, {})
                states[name] = self._joined(part, flat, boxes, [parts[str(i)] for i in range(len(boxes))])
            part.put(states)
        loaded(self.optimizer)
        set_steps(self.optimizer, found["steps"])

    def _matrix(self, part: Owned) -> CompactMatrix | None:
        found = self.compact.matrix(part.param)
        return None if found is None else found[0]

    def _elsewhere(self, part: Owned, stored: dict[Tensor, Stored]) -> bool:
        """Whether ranks of another tensor or pipeline rank hold it too, and the first stores it."""
        found = self.compact.matrix(part.param)
        weight = part.param if found is None else found[1].param
        return replicated(stored[weight])

    def _boxes(self, part: Owned, stored: dict[Tensor, Stored]) -> list[Box]:
        matrix = self._matrix(part)
        if matrix is None:
            return whole_boxes(stored[part.param], part.start, part.stop)
        return compact_boxes(matrix, part.start, part.stop)

    def _cut(self, part: Owned, flat: Tensor, boxes: list[Box]) -> Iterator[Tensor]:
        """Contiguous copies on the CPU of the boxes' elements of one state."""
        first, matrix = part.start, self._matrix(part)
        if matrix is not None and matrix.part.kind == "element":
            flat, first = _spread(matrix, flat, part.start), 0
        for box in boxes:
            yield box.of(flat, first).to("cpu", copy=True).contiguous()

    def _joined(self, part: Owned, flat: Tensor, boxes: list[Box], parts: list[Tensor]) -> Tensor:
        """fp32, like `flat` and on the CPU: the boxes' elements in their places, zero in padding."""
        matrix = self._matrix(part)
        if matrix is None or matrix.part.kind != "element":
            whole, first = torch.zeros(flat.numel()), part.start
        else:
            whole, first = torch.zeros(matrix.mask.shape[0] * matrix.mask.shape[1]), 0
        for box, data in zip(boxes, parts, strict=True):
            target = box.of(whole, first)
            target.copy_(data.view(target.shape))
        if matrix is None or matrix.part.kind != "element":
            return whole
        values = torch.zeros(matrix.param.numel())
        values[: matrix.mask.size] = matrix.mask.to("cpu").compact(whole)
        return values[part.start : part.stop]


def _spread(matrix: CompactMatrix, flat: Tensor, start: int) -> Tensor:
    """fp32 [R * C] of the whole shard: element-shielded values from the `start`-th on in their places, zeros elsewhere."""
    values = torch.zeros(matrix.param.numel())
    values[start : start + flat.numel()] = flat.cpu()
    return matrix.mask.to("cpu").expand(values[: matrix.mask.size])
