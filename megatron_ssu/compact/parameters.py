"""A shield on a rank's model chunks: what trains becomes a parameter, what does not asks for no gradient.

Before DDP wraps the chunks every weight with frozen elements becomes one of three:

    frozen    all of it: it asks for no gradient
    compact   it asks for no gradient either; each of its matrices has a parameter for its trainable part (matrix.py)
    pinned    hardly anything of it is frozen: it trains, and the frozen elements are put back (pinned.py)

megatron's DDP and distributed optimizer then see trainable elements only. W stays a parameter of its module, under megatron's
name; the compact parameters are in no state dict. They are written into W whenever they have changed, before W is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_ssu.compact.linear import connect, make_bias_gradient
from megatron_ssu.compact.matrix import CompactMatrix, part_of
from megatron_ssu.compact.pinned import PinnedWeight
from megatron_ssu.compact.rules import is_pinned
from megatron_ssu.compact.selection import Workspace
from megatron_ssu.compact.weight import CompactWeight
from megatron_ssu.engine.linear import Gemm
from megatron_ssu.models.layout import Layout, LocalParam
from megatron_ssu.shield.mask import Mask
from megatron_ssu.shield.shield_file import Shield

_PREFIX = "compact_"


class CompactParameters:
    """The compact and the pinned weights of this rank's chunks; without a shield there are none."""

    def __init__(self, chunks: Sequence[torch.nn.Module], layout: Layout, shield: Shield, *, gemm: Gemm | None) -> None:
        """`gemm` multiplies for Transformer Engine's layers; None: they compute whole gradients, which are picked from."""
        self.compact: dict[torch.nn.Module, CompactWeight] = {}
        self.pinned: dict[torch.nn.Parameter, PinnedWeight] = {}
        # What is written before a module runs; layers that a norm is fused into have weights of both kinds.
        self._writers: dict[torch.nn.Module, list[CompactWeight | PinnedWeight]] = {}
        self._matrices: dict[torch.nn.Parameter, tuple[CompactMatrix, LocalParam]] = {}
        self._stale: set[torch.nn.Module] = set()
        self._listeners: list[Callable[[], None]] = []
        self._hooks: list[Any] = []
        self._stores: list[Any] = []
        self._workspace = Workspace()
        owners = {p: m for chunk in chunks for m in chunk.modules() for p in m.parameters(recurse=False)}
        for local in layout:
            frozen = {m.name for m in local.matrices if shield.counts.get(m.name)}
            if frozen:  # masks are read here, and not kept: all of them are as large as the model, by element
                self._shield(owners[local.param], local, {name: shield.masks[name] for name in frozen}, gemm)
        for local in layout:
            module = owners[local.param]
            if local.matrices[0].kind == "bias" and local.param.requires_grad and not module.weight.requires_grad:
                make_bias_gradient(module)
        for chunk in chunks:
            self._share_embedding(chunk)
            _keep_graph(chunk)

    def _shield(self, module: torch.nn.Module, local: LocalParam, masks: dict[str, Mask], gemm: Gemm | None) -> None:
        frozen, elements = 0, 0
        for matrix in local.matrices:  # whole ones: the same choice on every rank
            mask = masks.get(matrix.name)
            frozen += mask.frozen_elements if mask is not None else 0
            elements += matrix.elements
        if frozen == elements:
            local.param.requires_grad_(False)
        elif is_pinned(local.param.dim(), frozen / elements):
            self.pinned[local.param] = PinnedWeight(local, masks)
            self._writers.setdefault(module, []).append(self.pinned[local.param])
        else:
            self.compact[module] = self._compact(module, local, masks)
            self._writers.setdefault(module, []).append(self.compact[module])
            store = connect(module, self.compact[module], gemm)
            self._stores += [store] if store is not None else []

    def _compact(self, module: torch.nn.Module, local: LocalParam, masks: dict[str, Mask]) -> CompactWeight:
        local.param.requires_grad_(False)
        matrices = []
        for matrix in local.matrices:
            part = part_of(local, matrix, masks.get(matrix.name))
            if part is None:
                continue
            found = CompactMatrix.of(local.param, part)
            _copy_marks(local.param, found.param)
            module.register_parameter(_PREFIX + matrix.kind, found.param)
            self._matrices[found.param] = found, local
            matrices.append(found)
        module.register_state_dict_post_hook(_leave_out)
        module.register_load_state_dict_post_hook(_not_missing)
        return CompactWeight(local.param, tuple(matrices), self._workspace)

    def _share_embedding(self, chunk: Any) -> None:
        """A head that reads the embedding of its own chunk gives the gradient to the embedding's compact parameters."""
        if not (chunk.share_embeddings_and_output_weights and chunk.pre_process and chunk.post_process):
            return
        compact = self.compact.get(chunk.embedding.word_embeddings)
        if compact is not None:
            connect(chunk.output_layer, compact, None)

    def matrix(self, param: torch.nn.Parameter) -> tuple[CompactMatrix, LocalParam] | None:
        """The matrix that a compact parameter belongs to and its weight; None for other parameters."""
        return self._matrices.get(param)

    def start(self) -> None:
        """Ready for training: DDP has wrapped the chunks, the optimizer is built."""
        for store in self._stores:
            store.prepare()
        for compact in self.compact.values():
            compact.placeholders()  # they last: not to lie between what comes and goes
            if getattr(compact.weight, "shared_embedding", False):
                # megatron adds up the gradients of the two copies of a tied embedding, and looks for them there.
                (matrix,) = compact.matrices
                compact.weight.main_grad = matrix.param.main_grad  # type: ignore[attr-defined]
        self.hook()

    def hook(self) -> None:
        """Write a module's parameters before it runs; to be called again when DDP has renewed its hooks, which come first."""
        for handle in self._hooks:
            handle.remove()
        self._hooks = [m.register_forward_pre_hook(self._before) for m in self._writers]

    def _before(self, module: torch.nn.Module, args: Any) -> None:
        if module in self._stale:
            self._stale.remove(module)
            self._write(module)

    def _write(self, module: torch.nn.Module) -> None:
        for weight in self._writers[module]:
            weight.write()

    def updated(self, *, gathered: bool) -> None:
        """The optimizer has taken a step; `gathered`: and every rank has all of the new parameters."""
        self._stale.update(self._writers)
        self._tell()
        if gathered:
            self.write()

    def write(self) -> None:
        """Write what is new into the weights; when all parameters have been gathered."""
        for module in self._stale:
            self._write(module)
        self._stale.clear()

    def read(self) -> None:
        """Begin anew from the weights, which have been loaded."""
        for compact in self.compact.values():
            compact.read()
        for pinned in self.pinned.values():
            pinned.read()
        self._stale.clear()
        self._tell()

    def when_changed(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever parameters have been updated or loaded, on all ranks alike."""
        self._listeners.append(listener)

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    def drop_gradients(self) -> None:
        """Zero the reduced gradients of pinned elements, before their norm is taken."""
        for pinned in self.pinned.values():
            pinned.drop_gradient()


def _copy_marks(weight: torch.nn.Parameter, param: torch.nn.Parameter) -> None:
    """Mark `param` as megatron marked the weight: how it is split over ranks, shared between stages, ..."""
    vars(param).update(vars(weight))
    # Of a weight that two modules use: DDP would add up placeholders, where it expects one gradient beside `main_grad`.
    vars(param).pop("zero_out_wgrad", None)


def _leave_out(module: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, _ in module.named_parameters(recurse=False):
        if name.startswith(_PREFIX):
            state.pop(prefix + name, None)


def _not_missing(module: torch.nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.rpartition(".")[2].startswith(_PREFIX)]


def _keep_graph(chunk: Any) -> None:
    """Where no weight of the embedding trains, let its output ask for a gradient.

    Recomputed layers run in a graph of their own, which needs an input that does; so does a stage without anything to train.
    """
    if not chunk.pre_process or any(p.requires_grad for p in chunk.embedding.parameters()):
        return

    def ask(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            output.requires_grad_()

    chunk.embedding.register_forward_hook(ask)
