"""What the ranks of the score tests do. Module-level functions: they are sent to other processes by name."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ssu.config.schema import CalibrationSection, CheckpointSection, ShieldSection
from megatron_ssu.data.calibration import Calibration, load_calibration
from megatron_ssu.data.tokenizer import load_tokenizer
from megatron_ssu.methods.scored import make_shield
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.parallel_model import ParallelModel, open_model
from megatron_ssu.scoring.calibration_pass import calibration_pass, micro_batches
from megatron_ssu.scoring.change import open_before
from megatron_ssu.scoring.score_model import Before, score_model
from megatron_ssu.scoring.scores_file import Scores
from megatron_ssu.scoring.squared_gradients import SquaredGradients
from tests.dist.work import run_config

NAMES = [
    "wanda",
    "wanda-released",
    "target-contrast",
    "magnitude",
    "magnitude-released",
    "random",
    "snr",
    "sparsegpt-diagonal",
    "sparsegpt-diagonal-released",
    "fisher",
]
GRANULARITIES = ("column", "row", "element")


def tokens(rows: int = 5, length: int = 16, vocab: int = 100, padded: int = 5, seed: int = 3) -> Calibration:
    """Random rows; the last one ends in padding, which is a token like any other to the model."""
    ids = torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[-1, length - padded :] = False
    return Calibration(ids, mask, "digest", rows, None)


def target() -> Calibration:
    """Rows of target text, other ones than `tokens`, which the model sees only a few different tokens of."""
    return tokens(3, 12, vocab=30, padded=2, seed=4)


def session_of(
    model: str, parallel: dict[str, Any], *, transformer: dict[str, Any] | None = None, **shield: Any
) -> ParallelModel:
    shield.setdefault("calibration", CalibrationSection(micro_batch_size=2))
    run = run_config(model, parallel, shield=ShieldSection(**shield))
    run.model.transformer.update(transformer or {})
    return open_model(run)


def scores(
    model: str,
    parallel: dict[str, Any],
    names: Sequence[str] = NAMES,
    data: Calibration | None = None,
    before: str | None = None,
    **options: Any,
) -> Scores | None:
    """A scores object on rank 0, with `before` also of the change from that model. Weights must take gradients again
    afterwards."""
    session, old = session_of(model, parallel, **options), None
    if before is not None:
        names, old = [*names, "change"], Before(open_before(model, before), model_fingerprint(before))
    made = score_model(
        session, list(names), data or tokens(), model_fingerprint(Path(model)), target=target(), before=old
    )
    assert all(p.requires_grad for chunk in session.chunks for p in chunk.parameters())
    return made


def mesh_scores(model: str, parallel: dict[str, Any], names: Sequence[str] = NAMES) -> Scores | None:
    """Scores on rank 0, with the norms' statistics, over the model's own calibration data where it has some."""
    session = session_of(model, parallel, norms="half")
    data = _source_tokens(model) or tokens()
    return score_model(session, list(names), data, model_fingerprint(Path(model)), target=target())


def scores_file(model: str, parallel: dict[str, Any], path: str) -> None:
    """Write the scores file of a mesh, with the norms' statistics."""
    made = mesh_scores(model, parallel)
    if made is not None:
        made.save(path)


def planned(model: str, parallel: dict[str, Any], directory: str, dtype: str, **shield: Any) -> None:
    """Plan on a mesh from a scores file, as `train` does before its first step."""
    run = run_config(
        model,
        parallel,
        dtype,
        shield=ShieldSection(norms="half", special_tokens=False, **shield),
        checkpoint=CheckpointSection(directory=directory),
    )
    make_shield(open_model(run))


def _source_tokens(model: str) -> Calibration | None:
    """Calibration data as a run has it, for a model with a tokenizer beside the shared calibration data."""
    data = Path(model).parent / "calibration.jsonl"
    if not data.exists():
        return None
    return load_calibration(data, load_tokenizer(model), samples=12, sequence_length=96, seed=1)


def fisher_peak(model: str, length: int) -> dict[str, int]:
    """Peak bytes that a forward-backward step with the score holds beyond what was there, and beyond its gradient sums.

    `without` is the same step with weights that take no gradient and no score, but with every linear layer's input kept
    for backward as a training step keeps it.
    """
    session = session_of(model, {})
    batches = micro_batches(tokens(1, length, padded=0), session, 1)
    gradients = SquaredGradients(session, "fisher")
    with_score = peak_bytes(lambda: calibration_pass(session, batches, None, backward=True))
    gradients._add = lambda *args: None  # type: ignore[method-assign]
    without = peak_bytes(lambda: calibration_pass(session, batches, None, backward=True))
    gradients.close()
    return {"with": with_score, "without": without}


class _Allocations(TorchDispatchMode):
    """Watches storages that torch operations make, and how many bytes of them live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def _gone(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {a.untyped_storage()._cdata for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in known and key not in self.live:
                    self.live[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key)
        return result


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that tensors made by `work` hold at once."""
    with _Allocations() as watched:
        work()
    return watched.peak


def without_data(model: str, parallel: dict[str, Any], names: Sequence[str]) -> Scores | None:
    """Scores without calibration data."""
    return score_model(session_of(model, parallel), list(names), None, model_fingerprint(Path(model)))


def scores_source(model: str, parallel: dict[str, Any]) -> Scores | None:
    """Scores of a model with a tokenizer over its own calibration data."""
    return scores(model, parallel, data=_source_tokens(model))
