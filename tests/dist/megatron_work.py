"""What ranks do for test_megatron_checkpoints.py: Megatron-LM's part, with megatron-core's own parts."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

import megatron_ssu as ssu
from megatron_ssu.engine.checkpoint_io import in_process_checkpoint_writers
from tests.dist import library_work

TRACKER = "latest_checkpointed_iteration.txt"
# What Megatron-LM's generate_state_dict asks for beside the model where it finetunes.
PLAIN = ("args", "checkpoint_version", "iteration", "num_floating_point_operations_so_far")


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "dp_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def load(folder: str, model_dir: str, parallel: tuple[int, int], ids: torch.Tensor, vocab: int, changes: dict) -> Any:
    """Load as Megatron-LM's training script does: tracker, common part, content metadata, tensors by its own strictness.

    Logits of the stock GPTModel, on the first rank of the last stage, and what the common part says.
    """
    library_work.start(*parallel)
    (chunk,) = library_work.build(model_dir, vocab=vocab, **changes)
    for weight in chunk.parameters():
        weight.data.fill_(float("nan"))
    tracker = (Path(folder) / TRACKER).read_text().strip()
    name = str(Path(folder) / (tracker if tracker == "release" else f"iter_{int(tracker):07d}"))
    assert dist_checkpointing.check_is_distributed_checkpoint(name)
    common = dist_checkpointing.load_common_state_dict(name)
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    assert metadata is not None
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = {"model": chunk.sharded_state_dict(metadata=metadata)}
    loaded = dist_checkpointing.load(state, name, strict=StrictHandling.ASSUME_OK_UNEXPECTED)
    chunk.load_state_dict(loaded["model"], strict=True)
    assert set(PLAIN) <= set(loaded) and loaded["checkpoint_version"] == 3.0
    return _logits(chunk, ids), vars(loaded["args"]), loaded["iteration"]


def save(folder: str, model_dir: str, parallel: tuple[int, int], vocab: int, changes: dict) -> None:
    """Write a checkpoint as Megatron-LM does, of the Hugging Face directory's weights."""
    library_work.start(*parallel)
    chunks = library_work.build(model_dir, vocab=vocab, **changes)
    ssu.load_weights(chunks, model_dir)
    metadata = _metadata() | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    name = Path(folder) / "iter_0000007"
    if torch.distributed.get_rank() == 0:
        name.mkdir(parents=True)
    torch.distributed.barrier()
    state = {
        "model": chunks[0].sharded_state_dict(metadata=metadata),
        "args": Namespace(tensor_model_parallel_size=parallel[0], pipeline_model_parallel_size=parallel[1]),
        "checkpoint_version": 3.0,
        "iteration": 7,
        "num_floating_point_operations_so_far": 1.0,
        "rng_state": dist_checkpointing.ShardedObject(
            "rng_state", [{"random": 1}], (torch.distributed.get_world_size(),), (torch.distributed.get_rank(),)
        ),
    }
    with in_process_checkpoint_writers():  # the stock ones are processes that these ranks cannot start
        dist_checkpointing.save(state, str(name), content_metadata=_metadata())
    if torch.distributed.get_rank() == 0:
        (Path(folder) / TRACKER).write_text("7")


def _logits(chunk: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor | None:
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    chunk.eval()

    def forward_step(iterator: Any, model: torch.nn.Module) -> Any:
        return model(ids, positions, None), lambda output, non_loss_data: output

    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=chunk,
            num_microbatches=1,
            seq_length=ids.shape[1],
            micro_batch_size=len(ids),
            forward_only=True,
            collect_non_loss_data=True,
        )
    if not parallel_state.is_pipeline_last_stage():
        return None
    whole = gather_from_tensor_model_parallel_region(outputs[0])
    return whole if parallel_state.get_tensor_model_parallel_rank() == 0 else None
