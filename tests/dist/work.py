"""What the ranks of the distributed tests do. Module-level functions: they are sent to other processes by name."""

from __future__ import annotations

from typing import Any

import torch

from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

from megatron_ssu.config.schema import CheckpointSection, ModelSection, ParallelSection, PrecisionSection, RunConfig
from megatron_ssu.session import Session, open_session


def run_config(model: str, parallel: dict[str, Any], dtype: str = "fp32", **sections: Any) -> RunConfig:
    return RunConfig(
        model=ModelSection(path=model),
        checkpoint=sections.pop("checkpoint", CheckpointSection(directory="unused")),
        parallel=ParallelSection(transformer=parallel),
        precision=PrecisionSection(dtype=dtype),  # type: ignore[arg-type]
        **sections,
    )


def logits(model: str, parallel: dict[str, Any], ids: torch.Tensor) -> torch.Tensor | None:
    """Logits [b, s, V] over all tensor-parallel ranks, on one rank of the last stage."""
    session = open_session(run_config(model, parallel))
    return whole_logits(session, ids)


def whole_logits(session: Session, ids: torch.Tensor) -> torch.Tensor | None:
    """Run one micro-batch through megatron's schedule; the unpadded logits on the first rank of the last stage."""
    batch, length = ids.shape
    positions = torch.arange(length).expand(batch, -1)
    for chunk in session.chunks:
        chunk.eval()

    def forward_step(iterator: Any, chunk: torch.nn.Module) -> Any:
        return chunk(ids, positions, None), lambda output, non_loss_data: output

    count = session.mesh.pipeline if session.mesh.virtual else 1
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[None] * session.mesh.chunks,
        model=session.chunks if session.mesh.virtual else session.chunks[0],
        num_microbatches=count,
        seq_length=length,
        micro_batch_size=batch,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not session.mesh.last_stage:
        return None
    whole = gather_from_tensor_model_parallel_region(outputs[0])
    return whole[..., : session.source.dims.vocab].detach() if session.mesh.tensor_rank == 0 else None
