"""GPTModel chunks that somebody else built with megatron-core: their layout, their weights, and a model to score."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    FullyShardedDataParallel,
    TorchFullyShardedDataParallel,
)

from megatron_ssu.config.schema import RunConfig
from megatron_ssu.engine.mesh import current_mesh
from megatron_ssu.engine.ranks import on_all_ranks
from megatron_ssu.errors import UserError
from megatron_ssu.models.family import Dims, Family
from megatron_ssu.models.hf_import import check_checkpoint, import_weights
from megatron_ssu.models.layout import FUSED_NORMS, Layout, LocalParam, unwrapped
from megatron_ssu.models.limits import check_heads
from megatron_ssu.models.parallel_model import ParallelModel
from megatron_ssu.models.source import Source

_PARALLEL = (
    DistributedDataParallel,
    FullyShardedDataParallel,
    TorchFullyShardedDataParallel,
    torch.nn.parallel.DistributedDataParallel,
)
# What a training loop hangs on a TransformerConfig for its DDP and optimizer.
_LOOP_FUNCTIONS = ("finalize_model_grads_func", "grad_scale_func", "no_sync_func", "grad_sync_func", "param_sync_func")


def layout_of(chunks: Any, family: Family, dims: Dims, command: str) -> tuple[list[Any], Layout]:
    """The bare GPTModels in `chunks` (one, or one per virtual stage) and their layout. Collective.

    Raises UserError, on all ranks alike, for chunks that DDP has wrapped, that are none of the family or of other sizes.
    """
    if not parallel_state.model_parallel_is_initialized():
        raise UserError(
            f"{command}: megatron's parallel_state must be initialized; call parallel_state.initialize_model_parallel before"
        )
    return on_all_ranks(lambda: _layout_of(chunks, family, dims, command))


def _layout_of(chunks: Any, family: Family, dims: Dims, command: str) -> tuple[list[Any], Layout]:
    given = list(chunks) if isinstance(chunks, Iterable) else [chunks]
    if not given or not all(isinstance(chunk, torch.nn.Module) for chunk in given):
        kinds = ", ".join(type(chunk).__name__ for chunk in given) or "an empty list"
        raise UserError(f"{command}: chunks must be a GPTModel or a list of them, got {kinds}")
    for chunk in given:
        _refuse_wrapped(chunk, command)
    bare = [unwrapped(chunk) for chunk in given]
    if any(name.rpartition(".")[2].startswith("compact_") for chunk in bare for name, _ in chunk.named_parameters()):
        raise UserError(f"{command}: a shield has been applied to these chunks already; build them anew")
    for chunk in bare:
        _check_chunk(chunk, family, dims, command)
    mesh = current_mesh()
    check_whole_experts(dims, command)
    check_heads(mesh.tensor, family, dims, f"{command}: tensor parallelism")
    vocab_rows = bare[0].vocab_size
    layout = Layout(family, dims, bare, mesh.tensor_rank, mesh.tensor, vocab_rows)
    for local in layout:
        _check_shape(local, vocab_rows // mesh.tensor, command)
    return bare, layout


def check_whole_experts(dims: Dims, command: str) -> None:
    """Raises UserError where megatron's groups would split a model's experts."""
    split = parallel_state.get_expert_tensor_parallel_world_size()
    if dims.experts is not None and split > 1:
        raise UserError(
            f"{command}: expert_tensor_parallel_size must be 1, got {split}; set it in initialize_model_parallel and in the "
            "TransformerConfig"
        )


def _wrappers(chunk: Any) -> Iterator[Any]:
    """A chunk, and what is in it on the way to the GPTModel."""
    yield chunk
    while isinstance(getattr(chunk, "module", None), torch.nn.Module):
        chunk = chunk.module
        yield chunk


def _refuse_wrapped(chunk: Any, command: str) -> None:
    wrapped = any(isinstance(part, _PARALLEL) for part in _wrappers(chunk))
    if wrapped or any(hasattr(p, "main_grad") for p in chunk.parameters()):
        raise UserError(
            f"{command}: {type(chunk).__name__}: DDP has wrapped this chunk already; {command} comes before "
            "DistributedDataParallel(...), and the optimizer after it"
        )


def _check_chunk(chunk: Any, family: Family, dims: Dims, command: str) -> None:
    """Raises UserError unless the chunk's sizes are those of config.json."""
    if not hasattr(chunk, "decoder") or not hasattr(chunk, "config") or not hasattr(chunk, "vocab_size"):
        raise UserError(f"{command}: chunks must be megatron-core's GPTModel, got {type(chunk).__name__}")
    config = chunk.config
    for name, found, wanted in (
        ("num_layers", config.num_layers, dims.layers),
        ("hidden_size", config.hidden_size, dims.hidden),
        ("num_attention_heads", config.num_attention_heads, dims.heads),
        ("num_query_groups", config.num_query_groups, dims.groups),
        ("kv_channels", config.kv_channels, dims.head),
        ("ffn_hidden_size", config.ffn_hidden_size, dims.ffn),
        ("num_moe_experts", config.num_moe_experts, dims.experts.count if dims.experts else None),
        ("share_embeddings_and_output_weights", chunk.share_embeddings_and_output_weights, dims.tied),
    ):
        if found != wanted:
            raise UserError(f"{command}: the GPTModel's {name} must be {wanted} as in config.json, got {found}")
    if chunk.vocab_size < dims.vocab:
        raise UserError(
            f"{command}: the GPTModel's vocab_size must be {dims.vocab} as in config.json, or more, got {chunk.vocab_size}"
        )
    centred = any(kind.startswith("centred") for entry in family.layer for kind in entry.kinds)
    if config.layernorm_zero_centered_gamma != centred:
        raise UserError(
            f"{command}: config.layernorm_zero_centered_gamma must be {centred} for a {family.name}, got "
            f"{config.layernorm_zero_centered_gamma}: norms would be read as others than Hugging Face's"
        )


def _check_shape(local: LocalParam, vocab_rows: int, command: str) -> None:
    """Raises UserError unless a parameter has the shape that the table gives it on this rank."""
    first = local.matrices[0]
    rows = vocab_rows if first.kind in ("embedding", "head") else sum(piece.rows for piece in local.pieces)
    columns = [local.pieces[0].col_stop - local.pieces[0].col_start] if local.pieces else [first.shape[-1]]
    wanted = (rows, *(columns if len(first.shape) == 2 else ()))
    if tuple(local.param.shape) != wanted:
        raise UserError(
            f"{command}: {local.name} must be {list(wanted)} on this rank for {first.name} of {list(first.shape)}, got "
            f"{list(local.param.shape)}; build the GPTModel as config.json says"
        )


def load_weights(chunks: Any, source: Source) -> None:
    """Fill a rank's chunks, before DDP wraps them, from a Hugging Face directory; collective.

    Rows that pad the vocabulary become zero. Raises UserError, on all ranks alike, as `layout_of`, and for tensors that are
    missing, of other shapes, or would be rounded to the chunks' dtype.
    """
    _, layout = layout_of(chunks, source.family, source.dims, "load_weights")
    dtype = layout.params[0].param.dtype if layout.params else torch.float32
    on_all_ranks(lambda: check_checkpoint(source.checkpoint, source.family, source.dims, dtype))
    import_weights(layout, source.checkpoint)


@contextmanager
def scoring_model(run: RunConfig, source: Source, chunks: Any) -> Iterator[ParallelModel]:
    """The chunks as a model to score, as they were afterwards; collective.

    While it lasts the schedules know nothing of the training loop. Raises UserError as `layout_of`, and for norms that are
    fused into linear layers, whose true inputs no hook sees.
    """
    bare, layout = layout_of(chunks, source.family, source.dims, "score")
    on_all_ranks(lambda: _refuse_fused(layout))
    if source.dims.experts is not None and current_mesh().tensor > 1 and not bare[0].config.sequence_parallel:
        raise UserError("score: config.sequence_parallel must be true for experts on several tensor-parallel ranks")
    config, training = bare[0].config, [chunk.training for chunk in bare]
    kept = {name: getattr(config, name) for name in _LOOP_FUNCTIONS}
    for name in kept:
        setattr(config, name, None)
    try:
        yield ParallelModel(run, current_mesh(), source, config, bare, layout)
    finally:
        for name, function in kept.items():
            setattr(config, name, function)
        for chunk, mode in zip(bare, training, strict=True):
            chunk.train(mode)


def _refuse_fused(layout: Layout) -> None:
    for local in layout:
        if local.name.endswith(tuple(FUSED_NORMS)):
            raise UserError(
                f"score: {local.name}: the norm is fused with the linear layer, whose input cannot be seen; leave chunks "
                "out, and the model's directory is scored on the same mesh"
            )
