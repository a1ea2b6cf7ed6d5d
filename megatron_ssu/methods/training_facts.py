"""What a run's steps compute, as facts of the run file that can be kept and compared: data, batch, optimizer, numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_ssu.config.schema import Ramp
from megatron_ssu.config.sources import isolates, replay_sources, train_sources

if TYPE_CHECKING:
    from megatron_ssu.config.schema import RunConfig

# Keys of megatron's that choose how fast or how large a step is, not what it computes.
_FREE_MODEL = (
    "recompute_",
    "attention_backend",
    "masked_softmax_fusion",
    "bias_",
    "apply_rope_fusion",
    "cpu_offloading",
)
_FREE_OPTIMIZER = (
    *("lr", "min_lr", "decoupled_lr", "decoupled_min_lr", "log_num_zeros_in_grad", "overlap_"),
    # where the optimizer keeps its state, and in which dtype; checkpoints have it in fp32
    *("use_precision_aware_optimizer", "main_params_dtype", "main_grads_dtype", "exp_avg_"),
    *("optimizer_cpu_offload", "optimizer_offload_fraction", "use_torch_optimizer_for_cpu_offload", "pin_cpu_"),
)
DOCUMENTS = "data.train (its documents' digests)"
BLEND = ("data.train (", "data.weights_in")  # how keys begin that may change while a run goes on: see data/blend.py


def training_facts(run: RunConfig, train_digests: Sequence[str]) -> dict[str, Any]:
    """By run-file key, as JSON: all but model, method and regularizers. `train_digests`: of the indexed datasets."""
    sources = train_sources(run)
    facts = {
        "data.train (its weights)": [_weight(source.weight) for source in sources],
        "data.train (its packing)": [[source.packing, source.too_long] for source in sources],
        DOCUMENTS: [digest[:16] for digest in train_digests],
        "data.train (its replay)": [len(replay_sources(run)), _weight(run.replay.fraction)],
        "data.weights_in": run.data.weights_in,
        "data.cross_document_attention": not isolates(run),
        "data.split": run.data.used_split,
        "data.seed": run.data.seed,
        "data.sequence_length": run.data.sequence_length,
        "data.text_key": run.data.text_key,
        "train.global_batch_size": run.train.global_batch_size,
        "train.seed": run.train.seed,
        "train.fused_adam": run.train.fused_adam,
    }
    facts |= section_facts("model", run.model.transformer, _FREE_MODEL)
    facts |= section_facts("precision", run.precision.transformer)
    facts |= section_facts("train.optimizer", run.train.optimizer, _FREE_OPTIMIZER)
    return facts


def _weight(weight: float | Ramp) -> Any:
    return [weight.start, weight.end] if isinstance(weight, Ramp) else weight


def section_facts(name: str, values: dict[str, Any], free: tuple[str, ...] = ()) -> dict[str, Any]:
    """Facts of the section `name`, as JSON, less the keys that begin with one of `free`."""
    return {
        f"{name}.{key}": value if isinstance(value, str | int | float | bool | None) else str(value)
        for key, value in values.items()
        if not key.startswith(free)
    }


def shown(value: Any) -> str:
    """A fact in a message."""
    if value is None:
        return "not set"
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
