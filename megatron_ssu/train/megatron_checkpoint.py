"""Checkpoints of weights as Megatron-LM and Megatron-Bridge write and read them.

    DIR/latest_checkpointed_iteration.txt     `release`, or the number of the newest iteration
    DIR/release/, DIR/iter_0000500/           torch_dist files; common.pt with args, checkpoint_version, iteration, ...

Their keys are megatron-core's, but for the norms before a linear layer, which Transformer Engine fuses into it and which their
local layers store under the same names. A `release` has weights alone: a loader starts at iteration 0, without an optimizer.
"""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_ssu.engine.checkpoint_io import check_foreign_metadata, load_tensors
from megatron_ssu.engine.ranks import on_all_ranks, on_rank_zero
from megatron_ssu.errors import UserError, named_line
from megatron_ssu.io.atomic import to_disk, written_aside
from megatron_ssu.models.family import Dims
from megatron_ssu.models.parallel_model import ParallelModel
from megatron_ssu.models.rope import ropes
from megatron_ssu.train.sharded_state import model_state
from megatron_ssu.train.storage import DistCheckpointing

TRACKER, RELEASE = "latest_checkpointed_iteration.txt", "release"
# Ends of our keys and of theirs.
_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "self_attention.linear_proj.post_norm.weight": "self_attention.linear_proj.post_layernorm.weight",
    "mlp.linear_fc2.post_norm.weight": "mlp.linear_fc2.post_layernorm.weight",
}
_EXPERT_ARGUMENTS = (
    "moe_ffn_hidden_size",
    "moe_layer_freq",
    "moe_router_topk",
    "moe_router_pre_softmax",
    "moe_router_dtype",
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
    "moe_grouped_gemm",
)
_CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


def their_key(key: str, dims: Dims) -> str:
    """The key of a weight in their checkpoints. Transformer Engine fuses the norm before experts into no linear layer."""
    if key.endswith("pre_mlp_layernorm.weight") and dims.experts is not None:
        layer = re.search(r"\blayers\.(\d+)\.", key)  # without a number where all layers are alike
        if dims.sparse(int(layer[1])) if layer else all(dims.experts.layers):
            return key
    return _fused_key(key)


def _fused_key(key: str) -> str:
    return next((key.removesuffix(ours) + theirs for ours, theirs in _NORMS.items() if key.endswith(ours)), key)


def is_megatron_checkpoint(path: str | Path) -> bool:
    """Whether a directory is one of theirs: that of all iterations, or of one."""
    return (Path(path) / TRACKER).is_file() or (Path(path) / "metadata.json").is_file()


def write_release(session: ParallelModel, folder: Path, *, iteration: int = 0) -> Path:
    """Write the model's weights as `folder`/release; collective. The folder of its files.

    `iteration`: of the training that they are from; a loader starts at 0 all the same. Raises UserError where `folder` cannot
    be written; it must be empty or not there.
    """
    target = folder / RELEASE
    on_rank_zero(lambda: _make(target))
    state: dict[str, Any] = model_state(session, extra_state=True)  # which their loader asks for
    for entry in nested_values(state):
        entry.key = their_key(entry.key, session.source.dims)
    state |= {
        "args": _arguments(session),
        "content_metadata": dict(_CONTENT),
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "num_floating_point_operations_so_far": 0,
    }

    request = DistCheckpointing().write(state, target, background=False)

    def write() -> None:
        try:
            if request.write is not None:
                request.write(lambda: None)
            if request.errors:
                raise request.errors[0]
        except OSError as error:
            raise UserError(f"{target}: cannot be written: {error.strerror}; make room and start again") from error

    on_all_ranks(write)
    request.finalize()
    on_rank_zero(lambda: _complete(folder, target))
    return target


def _make(target: Path) -> None:
    try:
        target.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{target}: cannot be made ({error.strerror}); name another directory") from error


def _complete(folder: Path, target: Path) -> None:
    DistCheckpointing().complete(target)
    for file in (*target.iterdir(), target):
        to_disk(file)
    with written_aside(folder / TRACKER) as fresh:
        fresh.write_text(RELEASE)
    to_disk(folder)


def _arguments(session: ParallelModel) -> Namespace:
    """What their `--use-checkpoint-args` takes over, under the names of Megatron-LM's options."""
    config, dims, rope = session.config, session.source.dims, next(iter(ropes(session.source.hf, "").values()))
    hf = session.source.hf
    theta = (hf.get("rope_parameters") or {}).get("rope_theta", hf.get("rope_theta", 10000.0))
    return Namespace(
        num_layers=dims.layers,
        hidden_size=dims.hidden,
        ffn_hidden_size=dims.ffn,
        num_experts=config.num_moe_experts,
        **{name: getattr(config, name) for name in _EXPERT_ARGUMENTS if dims.experts is not None},
        num_attention_heads=dims.heads,
        group_query_attention=dims.groups != dims.heads,
        num_query_groups=dims.groups,
        kv_channels=dims.head,
        max_position_embeddings=dims.positions,
        seq_length=dims.positions,
        position_embedding_type="rope",
        use_rotary_position_embeddings=True,
        add_position_embedding=False,
        rotary_base=theta if isinstance(theta, int | float) else 10000.0,
        rotary_percent=rope.rotated / dims.head,
        normalization="RMSNorm",
        norm_epsilon=config.layernorm_epsilon,
        apply_layernorm_1p=config.layernorm_zero_centered_gamma,
        swiglu=config.activation_func is torch.nn.functional.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        add_bias_linear=False,
        add_qkv_bias=config.add_qkv_bias,
        qk_layernorm=config.qk_layernorm,
        untie_embeddings_and_output_weights=not dims.tied,
        padded_vocab_size=session.chunks[0].vocab_size,
        make_vocab_size_divisible_by=session.run.model.make_vocab_size_divisible_by,
        bf16=config.bf16,
        fp16=False,
        params_dtype=config.params_dtype,
        tensor_model_parallel_size=session.mesh.tensor,
        pipeline_model_parallel_size=session.mesh.pipeline,
        virtual_pipeline_model_parallel_size=session.mesh.virtual,
        context_parallel_size=session.mesh.context,
        expert_model_parallel_size=session.mesh.expert,
        data_parallel_size=session.mesh.data,
        world_size=session.mesh.world,
        consumed_train_samples=0,
        skipped_train_samples=0,
        consumed_valid_samples=0,
        no_save_optim=True,
        no_save_rng=True,
    )


def newest(path: str | Path, key: str) -> Path:
    """The folder of the newest checkpoint in a directory of theirs, or `path` itself if it is one; `key` named it.

    Raises UserError where it is neither, or its files are not torch_dist's.
    """
    folder = Path(path)
    tracker = folder / TRACKER
    if tracker.is_file():
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        folder = folder / (text if text == RELEASE else f"iter_{text:0>7}")
    if not (folder / ".metadata").is_file() or not (folder / "metadata.json").is_file():
        raise UserError(
            f"{key}: {folder} must be a torch_dist checkpoint with .metadata and metadata.json in it; name the directory with "
            f"{TRACKER}, or convert an older format with Megatron-LM's own tools"
        )
    try:
        check_foreign_metadata(folder / ".metadata")
    except Exception as error:  # unpickling damaged bytes raises many kinds
        raise UserError(f"{key}: {folder / '.metadata'} cannot be read ({named_line(error)}); copy it again") from error
    return folder


def read_weights(session: ParallelModel, folder: Path) -> None:
    """Fill the session's chunks from one of their checkpoints, of any mesh; collective. Nothing but tensors is read.

    The padded vocabulary may have another size: rows that pad it are not looked at. Raises UserError, on all ranks alike, for
    tensors that are missing, of other shapes, or of another dtype than the session's.
    """
    state = model_state(session)
    apply_factories(state)
    wanted = [entry for entry in nested_values(state) if isinstance(entry, ShardedTensor)]
    on_all_ranks(lambda: _match(wanted, folder, session.source.dims))
    on_all_ranks(lambda: _load(state, folder))


def _match(wanted: list[ShardedTensor], folder: Path, dims: Dims) -> None:
    """Give every tensor the key that it has in the checkpoint, and the stored shape where a padded vocabulary differs."""
    there = dist_checkpointing.load_tensors_metadata(str(folder))
    for entry in wanted:
        theirs = their_key(entry.key, dims)
        # megatron-core's local layers store the norm before experts as others.
        entry.key = next((key for key in (theirs, _fused_key(entry.key)) if key in there), entry.key)
        stored = there.get(entry.key)
        if stored is None:
            raise UserError(
                f"{folder}: has no tensor {theirs}; it must be a checkpoint of the model that config.json describes, with the "
                "same layers on all stages"
            )
        if stored.dtype != entry.dtype:
            raise UserError(
                f"{folder}: {entry.key} is stored in {str(stored.dtype).removeprefix('torch.')}, precision.dtype asks for "
                f"{str(entry.dtype).removeprefix('torch.')}: rounding would move frozen weights; change precision.dtype"
            )
        if tuple(stored.global_shape) != tuple(entry.global_shape) and not entry.allow_shape_mismatch:
            raise UserError(
                f"{folder}: {entry.key} is {list(stored.global_shape)}, config.json makes it {list(entry.global_shape)}; is it "
                "a checkpoint of the same model?"
            )


def _load(state: dict[str, Any], folder: Path) -> None:
    try:
        with torch.no_grad():
            load_tensors(state, folder)
    except Exception as error:  # megatron and torch raise many kinds for damaged files
        raise UserError(f"{folder}: cannot be read ({named_line(error)}); copy it again") from error
