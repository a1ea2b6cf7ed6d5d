"""A shield on GPTModel chunks that somebody else built with megatron-core and trains with a loop of their own.

The loop stays stock. What it would have to do for the shield happens in two places that it passes anyway:

    config.finalize_model_grads_func   megatron's schedules call it after the last micro-batch's backward pass; wrapped, it also
                                       zeroes the reduced gradients of pinned elements
    the chunks' forward pass           after it, the first forward pass writes what the optimizer made of the compact
                                       parameters into the weights

Loops that finalize gradients by themselves name the optimizer instead (`AppliedShield.attach`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor

from megatron_ssu.compact.parameters import CompactParameters
from megatron_ssu.compact.trial import tried_gemm
from megatron_ssu.engine.experts import mark_experts
from megatron_ssu.engine.mesh import current_mesh
from megatron_ssu.engine.ranks import on_all_ranks, on_rank_zero
from megatron_ssu.engine.step_hooks import around_step
from megatron_ssu.errors import UserError
from megatron_ssu.io.atomic import check_target
from megatron_ssu.models.borrowed import layout_of
from megatron_ssu.models.family import Dims, Family
from megatron_ssu.models.hf_export import export_model
from megatron_ssu.models.hf_files import HFCheckpoint
from megatron_ssu.models.layout import Layout
from megatron_ssu.shield.shield_file import Shield

_GRAPH = "what trains is written into the weights before a layer runs, which a recorded graph would not repeat"
# Settings of a TransformerConfig that a shield does not go with: field -> values that are refused, reason.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "enable_cuda_graph": ((True,), _GRAPH),
    "external_cuda_graph": ((True,), _GRAPH),
    "cuda_graph_impl": (("local", "transformer_engine"), _GRAPH),
    "defer_embedding_wgrad_compute": ((True,), "a shielded head adds its weight gradient in its own backward pass"),
}


class AppliedShield:
    """The handle of a shield on this rank's chunks.

    Nothing of it must be called for training where `config.finalize_model_grads_func` is set, as Megatron-LM's loop does.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], layout: Layout, shield: Shield) -> None:
        """`chunks`: bare GPTModels before DDP wraps them. Collective."""
        self.shield, self.layout, self.chunks = shield, layout, tuple(chunks)
        gemm = tried_gemm(self.chunks[0].config) if shield.masks else None
        self.compact = CompactParameters(self.chunks, layout, shield, gemm=gemm)
        self._started = self._attached = self._pending = False
        for chunk in self.chunks:
            chunk.register_forward_pre_hook(self._before)

    def attach(self, optimizer: Any) -> None:
        """Act around `optimizer.step()`: for loops that do not set config.finalize_model_grads_func.

        `optimizer`: what `get_megatron_optimizer` returned for these chunks. Raises UserError when called twice.
        """
        if self._attached:
            raise UserError("attach: the shield is attached to an optimizer already; call it once per optimizer")
        around_step(optimizer, self.drop_gradients, self.updated)
        self._attached = True

    def drop_gradients(self) -> None:
        """Zero the reduced gradients of pinned elements; between their reduction and their norm. Done by itself."""
        if self._start():
            self.compact.drop_gradients()

    def updated(self) -> None:
        """The optimizer steps: the next forward pass writes what it makes into the weights. Done by itself."""
        self._pending = True

    def write(self, wrapped: Iterable[Any] = ()) -> None:
        """Bring the weights up to date; before they are read (saved, exported, compared). Collective with `wrapped`.

        wrapped: with overlap_param_gather, the DDP chunks, unless `disable_forward_pre_hook(param_sync=True)` was called on
            them before. Their parameters are gathered first.
        """
        for chunk in wrapped:
            if chunk.ddp_config.overlap_param_gather:
                chunk.disable_forward_pre_hook(param_sync=True)
                chunk.enable_forward_pre_hook()
                self.compact.hook()
        if self._pending:
            self.compact.updated(gathered=True)
        else:
            self.compact.write()

    def read(self) -> None:
        """Begin anew from the weights; after something loaded them into the model.

        An optimizer that is there already takes them over by its own `reload_model_params()`, after this.
        """
        self.compact.read()
        self._pending = False

    def export(self, model_dir: str | Path, target: str | Path, *, max_shard_size: int = 5 * 10**9) -> None:
        """Write the model, whose weights are up to date (`write`), as a Hugging Face directory; collective.

        model_dir: the source model's directory; each tensor gets the dtype that it has there, and config and tokenizer files
            come along. max_shard_size: bytes of one file. Raises UserError where `target` is there already or cannot be
            written.
        """
        path = on_rank_zero(lambda: check_target(target, "export"))
        export_model(self.layout, current_mesh(), HFCheckpoint(model_dir), path, max_shard_size)

    def _start(self) -> bool:
        """Make ready once DDP has wrapped the chunks; whether it has."""
        if not self._started:
            params = [p for chunk in self.chunks for p in chunk.parameters() if p.requires_grad]
            if all(hasattr(p, "main_grad") for p in params):
                self.compact.start()
                self._started = True
        return self._started

    def _before(self, chunk: Any, args: Any) -> None:
        """Before a chunk's forward pass."""
        if not self._start():
            return
        training = chunk.training and torch.is_grad_enabled()
        if training and not self._attached:
            self._watch(chunk.config)
        if self._pending:
            # An evaluation may come between the gradients and the step: then the weights are written again after it.
            self._pending = not training
            self.compact.updated(gathered=False)
            self.compact.hook()  # after those of DDP, which it may have renewed

    def _watch(self, config: Any) -> None:
        """See to it that the schedule's end of gradients is seen; loops may set it anew at any time."""
        found = config.finalize_model_grads_func
        if found is None:
            raise UserError(
                "config.finalize_model_grads_func: must be set, e.g. to megatron.core.distributed.finalize_model_grads, for "
                "the shield to see steps; set it, or call the handle's attach(optimizer) before training"
            )
        if not isinstance(found, _Finalize):
            found = config.finalize_model_grads_func = _Finalize(found)
        if self not in found.handles:
            found.handles.append(self)


class _Finalize:
    """The loop's function that finalizes gradients, and what shields do afterwards."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock
        self.handles: list[AppliedShield] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.stock(*args, **kwargs)
        for handle in self.handles:
            handle.drop_gradients()
            handle.updated()
        return result

    def __deepcopy__(self, memo: Any) -> _Finalize:
        return self  # a copied config is of the same model


def apply_shield(chunks: Any, shield: Shield, family: Family, dims: Dims) -> AppliedShield:
    """Put a shield on a rank's chunks, before DDP wraps them. Collective.

    Raises UserError, on all ranks alike, as `layout_of`, and for a shield of other matrices.
    """
    bare, layout = layout_of(chunks, family, dims, "apply")
    on_all_ranks(lambda: _check_shield(shield, family, dims))
    on_all_ranks(lambda: _check_config(bare[0].config, layout))
    for chunk in bare:
        mark_experts(chunk, current_mesh())
    return AppliedShield(bare, layout, shield)


def _check_shield(shield: Shield, family: Family, dims: Dims) -> None:
    known = {matrix.name: matrix for matrix in family.matrices(dims)}
    for name, matrix in shield.matrices.items():
        if name not in known:
            raise UserError(
                f"{shield.label}: shields {name}, which this {family.name} model does not have; plan one for this model"
            )
        if matrix.shape != known[name].shape:
            raise UserError(
                f"{shield.label}: {name} must be {list(known[name].shape)} for this model, got {list(matrix.shape)}; plan one "
                "for this model"
            )


def _check_config(config: Any, layout: Layout) -> None:
    for name, (values, reason) in _REFUSED.items():
        if getattr(config, name, None) in values:
            raise UserError(f"apply: config.{name}: {getattr(config, name)!r} does not go with a shield: {reason}")
    wanted = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32
    for local in layout:
        if is_float8tensor(local.param):
            raise UserError(
                f"apply: {local.name} is kept in FP8, into which elements cannot be written; leave fp8_param out"
            )
        if local.param.dtype is not wanted:
            raise UserError(
                f"apply: {local.name} must be {wanted} as config says, got {local.param.dtype}; wrap the model in "
                "Float16Module first, or set params_dtype"
            )
