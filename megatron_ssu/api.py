"""The library, without a run file: scores, shields, and a shield on a model that somebody else trains. See docs/api.md.

Thin: every function checks and converts what it is given and calls the part of the package that does the work. What needs
torch or megatron-core is imported by the function that uses it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_ssu.errors import UserError
from megatron_ssu.models.family import Dims, Family

if TYPE_CHECKING:
    from megatron_ssu.compact.applied import AppliedShield
    from megatron_ssu.config.schema import RunConfig
    from megatron_ssu.data.calibration import Calibration
    from megatron_ssu.models.parallel_model import ParallelModel
    from megatron_ssu.models.source import Source
    from megatron_ssu.scoring.scores_file import Scores
    from megatron_ssu.shield.inspect import Inspection
    from megatron_ssu.shield.shield_file import Shield
    from megatron_ssu.shield.verify import VerifyReport

PathLike = str | Path


def load_shield(path: PathLike) -> Shield:
    """Open a shield file and check all of its masks; they are read again, one by one, when they are asked for.

    Raises UserError when the file is missing, of another kind, truncated or altered.
    """
    from megatron_ssu.shield import shield_file

    return shield_file.load_shield(path, check=True)


def verify(source_dir: PathLike, adapted_dir: PathLike, shield: Shield | PathLike) -> VerifyReport:
    """Compare two Hugging Face directories under a shield, bit by bit; `ok` of the result: no frozen bit moved.

    Raises UserError when a file is missing or damaged, the shield is of another model than `source_dir`, or the directories
    differ in tensor names, dtypes or shapes.
    """
    from megatron_ssu.shield import verify as verifying

    source_dir, adapted_dir = _fetched(source_dir, "source_dir"), _fetched(adapted_dir, "adapted_dir")
    return verifying.verify(source_dir, adapted_dir, _shield(shield))


def inspect(
    shield: Shield | PathLike,
    scores: Scores | PathLike | None = None,
    other: Shield | PathLike | None = None,
    *,
    score: str | None = None,
) -> Inspection:
    """Look at a shield: what it freezes per matrix; with `scores` cuts and margins, with `other` the overlap of the two.

    score: which of the scores to show, by default the shield's own. `to_dict()` of the result is the table as JSON values,
    `render(console)` prints it. Raises UserError for scores or a shield of another model.
    """
    from megatron_ssu.shield.inspect import inspect_shield

    given = None if scores is None else _scores(scores)
    return inspect_shield(_shield(shield), given, None if other is None else _shield(other), score=score)


def score(
    model_dir: PathLike,
    *,
    calibration: PathLike | Sequence[PathLike] | Calibration | None = None,
    target_calibration: PathLike | Sequence[PathLike] | None = None,
    change_from: PathLike | None = None,
    scores: Sequence[str] = ("wanda",),
    samples: int = 500,
    sequence_length: int = 2048,
    micro_batch_size: int = 1,
    seed: int = 1234,
    norms: bool = False,
    dtype: Literal["bf16", "fp32"] | None = None,
    trust_remote_code: bool = False,
    chunks: Any = None,
) -> Scores:
    """Score the weights of a Hugging Face model; the same scores on every rank. Formulas: docs/shields.md.

    It runs in this process, or, where the caller has initialized megatron's parallel_state, on that mesh, collectively; then
    the caller's process groups stay as they are.

    Args:
        model_dir: the model's Hugging Face directory: weights, config.json, and a tokenizer where calibration needs one.
        calibration: JSONL file or files of source chats (.gz, .zst too), of which `samples` lines drawn by `seed` are packed
            into rows of `sequence_length` tokens; or packed rows. None: for scores of the weights alone.
        target_calibration: JSONL file or files of target text, for `target-contrast`; drawn and packed alike.
        change_from: Hugging Face directory of the checkpoint that `change` compares with.
        scores: names; docs/shields.md lists them.
        micro_batch_size: rows of one forward pass on each data-parallel rank.
        norms: also measure the norms' inputs, for `plan(norms="half")` and `"half-released"`.
        dtype: of weights and activations; None: bf16 for a model that is stored in it, else fp32.
        trust_remote_code: let the tokenizer run code out of `model_dir`.
        chunks: this rank's GPTModel or list of virtual stages with the weights of `model_dir` in them, before DDP wraps
            them; None: the model is built and loaded from `model_dir`, and freed afterwards.

    Raises:
        UserError: an unknown score, missing or bad calibration data, NaN or infinite weights or activations, a model that is
            not supported, chunks that do not fit it; on all ranks alike.
    """
    from megatron_ssu.data.calibration import Calibration
    from megatron_ssu.engine.ranks import on_all_ranks, on_rank_zero
    from megatron_ssu.methods.scored import Samples, load_samples
    from megatron_ssu.models.fingerprint import model_fingerprint
    from megatron_ssu.models.source import open_source
    from megatron_ssu.scoring import registry
    from megatron_ssu.scoring.score_model import score_model

    names = [scores] if isinstance(scores, str) else list(scores)
    for name in names:
        registry.score_named(name, "scores")
    if not names:
        raise UserError(f"scores: must name at least one of {', '.join(registry.SCORES)}, got none")
    for value, key, needing in (
        (calibration, "calibration", registry.needing_calibration(names)),
        (target_calibration, "target_calibration", registry.needing_target(names)),
        (change_from, "change_from", registry.needing_change(names)),
    ):
        if value is None and needing:
            raise UserError(f"{key}: must be given for the score {needing[0]}, got None")
    model_dir = _fetched(model_dir, "model_dir")
    source = open_source(model_dir)
    wanted = registry.made_by_score(names)
    run = _run(model_dir, dtype or _stored_dtype(source), trust_remote_code)
    run.shield.score, run.shield.also_score, run.shield.norms = names[0], names[1:], "half" if norms else "trainable"
    run.shield.change_from = None if change_from is None else str(_fetched(change_from, "change_from"))
    for section, given in (
        (run.shield.calibration, calibration),
        (run.shield.target_calibration, target_calibration),
    ):
        section.samples, section.sequence_length, section.seed = samples, sequence_length, seed
        section.micro_batch_size = micro_batch_size
        if isinstance(given, str | Path):
            section.path = str(given)
        elif isinstance(given, Sequence):
            section.path = [str(path) for path in given]
    packed = calibration if isinstance(calibration, Calibration) else None
    with _model(run, source, chunks) as model:
        read: Samples = on_all_ranks(lambda: load_samples(run, source, packed))
        fingerprint = on_rank_zero(lambda: model_fingerprint(model_dir, "model_dir"))
        found = score_model(model, wanted, read.source, fingerprint, target=read.target, before=read.before)
        return on_rank_zero(lambda: found)  # type: ignore[return-value]


def plan(
    scores: Scores | PathLike,
    ratio: float = 0.5,
    granularity: Literal["column", "row", "element", "matrix", "layer"] = "column",
    *,
    score: str | None = None,
    budget: str = "uniform",
    kinds: Mapping[str, float] | None = None,
    floor: float = 0.0,
    ceiling: float = 1.0,
    freeze: Literal["highest", "lowest"] = "highest",
    protect: Sequence[tuple[str, Literal["frozen", "trainable"]]] = (),
    norms: Literal["trainable", "frozen", "half", "half-released"] = "trainable",
    biases: Literal["trainable", "frozen", "half"] = "trainable",
    special_tokens: bool = True,
    model_dir: PathLike | None = None,
    change_from: PathLike | None = None,
    seed: int = 1234,
    trust_remote_code: bool = False,
) -> Shield:
    """Choose what to freeze; the same shield from the same scores on every machine. `shield.save(path)` writes it.

    Args:
        scores: of `score`, or a scores file.
        ratio: fraction that is frozen of every matrix (budget uniform), or of all of them (layerwise).
        score: which of the scores; None: `wanda` where it is there, else the only one.
        budget, kinds, floor, ceiling, freeze, norms, biases: see docs/shields.md.
        protect: (pattern, "frozen" or "trainable"): weights that are so whatever their scores; a later rule goes first.
        special_tokens: freeze the rows of embedding and head that the chat template's special tokens use; needs `model_dir`.
        model_dir: the scored model's directory; needed by special tokens, by granularity element and by norms
            or biases half.
        change_from: as for `score`; needed by granularity element of the score `change`.
        seed: of the score `random`.
        trust_remote_code: let the tokenizer run code out of `model_dir`.

    Raises:
        UserError: impossible options, scores that are missing or of another model than `model_dir`, a rule that fits nothing.
    """
    from megatron_ssu.shield.plan import PlanOptions, plan_shield
    from megatron_ssu.shield.select import ProtectRule

    scores = _scores(scores)
    options = PlanOptions(
        score=score or _only_score(scores),
        granularity=granularity,
        budget=budget,
        ratio=ratio,
        kinds=dict(kinds or {}),
        floor=floor,
        ceiling=ceiling,
        freeze=freeze,
        seed=seed,
        protect=[ProtectRule(pattern, action) for pattern, action in protect],
        norms=norms,
        biases=biases,
    )
    if model_dir is None:
        if special_tokens:
            raise UserError(
                "plan: special_tokens needs model_dir, whose tokenizer says which tokens they are; give it, or "
                "special_tokens=False"
            )
        return plan_shield(scores, options, method="ssu")
    from megatron_ssu.methods.planned import special_token_rows, weights_before
    from megatron_ssu.models.source import open_source

    model_dir = _fetched(model_dir, "model_dir")
    source = open_source(model_dir)
    _check_fingerprint(scores, source)
    run = _run(model_dir, "fp32", trust_remote_code)
    run.shield.special_tokens = special_tokens
    rows = special_token_rows(run, source)
    before = None
    if change_from is not None:
        run.shield.score, run.shield.granularity = options.score, granularity
        run.shield.change_from = str(_fetched(change_from, "change_from"))
        before = weights_before(run, source, scores)
    return plan_shield(scores, options, method="ssu", frozen_rows=rows, weights=source.checkpoint.get, before=before)


def apply(chunks: Any, shield: Shield | PathLike, hf_config_or_dir: Any) -> AppliedShield:
    """Put a shield on GPTModel chunks that megatron-core's own classes made, before DDP wraps them; collective.

    Afterwards DDP, the distributed optimizer and the training loop are stock: they see what trains. docs/api.md says when the
    handle that comes back is needed.

    Args:
        chunks: this rank's GPTModel, or the list of its virtual stages, of the local or the Transformer Engine layer spec,
            bare or in Float16Module, with the source model's weights in them.
        shield: or a shield file.
        hf_config_or_dir: config.json as a dict or a transformers config; or the source model's directory, which is then
            checked to be the one that the shield was made for.

    Raises:
        UserError: chunks that DDP has wrapped, of another family or size than the config, settings that a shield does not go
            with, a shield of another model; on all ranks alike.
    """
    from megatron_ssu.compact.applied import apply_shield

    shield = _shield(shield)
    family, dims = _family(hf_config_or_dir, shield)
    return apply_shield(chunks, shield, family, dims)


def load_weights(chunks: Any, model_dir: PathLike) -> None:
    """Fill GPTModel chunks that megatron-core's own classes made from a Hugging Face directory, before DDP; collective.

    Raises UserError, on all ranks alike, for chunks as in `apply` and for tensors that are missing, of other shapes, or would
    be rounded to the chunks' dtype.
    """
    from megatron_ssu.models import borrowed
    from megatron_ssu.models.source import open_source

    borrowed.load_weights(chunks, open_source(_fetched(model_dir, "model_dir")))


def _fetched(directory: PathLike, key: str) -> PathLike:
    """A directory as it is; a hub id pinned to a commit whose files are in the cache. Every process asks for itself."""
    from megatron_ssu.models.hub import download, is_reference, pin

    if not is_reference(str(directory)):
        return directory
    pinned = pin(str(directory), key)
    download(pinned, key)
    return pinned


def _shield(given: Shield | PathLike) -> Shield:
    return load_shield(given) if isinstance(given, str | Path) else given


def _scores(given: Scores | PathLike) -> Scores:
    from megatron_ssu.scoring.scores_file import Scores

    return Scores.load(given) if isinstance(given, str | Path) else given


def _only_score(scores: Scores) -> str:
    if "wanda" in scores.scores:
        return "wanda"
    if len(scores.scores) != 1:
        raise UserError(
            f"plan: score must be one of {', '.join(scores.scores) or 'none: there are no scores'}; name one"
        )
    return scores.scores[0]


def _check_fingerprint(scores: Scores, source: Source) -> None:
    from megatron_ssu.models.fingerprint import model_fingerprint
    from megatron_ssu.models.hf_config import difference

    fingerprint = model_fingerprint(source.path, "model_dir")
    if scores.fingerprint != fingerprint:
        raise UserError(
            f"plan: scores of model {scores.model}, not of {source.name} in model_dir: other "
            f"{difference(scores.fingerprint, fingerprint)}; score that model"
        )


def _family(hf: Any, shield: Shield) -> tuple[Family, Dims]:
    """Family and sizes of what `apply` was given as the model's config."""
    from megatron_ssu.engine.ranks import on_rank_zero
    from megatron_ssu.models.families import family_of
    from megatron_ssu.models.fingerprint import model_fingerprint
    from megatron_ssu.models.source import open_source
    from megatron_ssu.shield.shield_file import check_model

    if isinstance(hf, str | Path):
        hf = _fetched(hf, "hf_config_or_dir")
        source = open_source(hf)
        on_rank_zero(lambda: check_model(shield, model_fingerprint(hf, "hf_config_or_dir"), source.name))
        return source.family, source.dims
    hf = hf.to_dict() if hasattr(hf, "to_dict") else hf
    if not isinstance(hf, Mapping):
        raise UserError(
            f"hf_config_or_dir: must be a directory, config.json as a dict or a transformers config, got {type(hf).__name__}"
        )
    return family_of(dict(hf)), Dims.from_hf(dict(hf))


def _run(model_dir: PathLike, dtype: Literal["bf16", "fp32"], trust_remote_code: bool) -> RunConfig:
    """The settings that scoring and planning read; nothing is written into the checkpoint directory."""
    from megatron_ssu.config.schema import CheckpointSection, ModelSection, PrecisionSection, RunConfig

    return RunConfig(
        model=ModelSection(path=str(model_dir), trust_remote_code=trust_remote_code),
        checkpoint=CheckpointSection(directory=os.devnull),
        precision=PrecisionSection(dtype=dtype),
    )


def _stored_dtype(source: Source) -> Literal["bf16", "fp32"]:
    stored = {source.checkpoint.dtype(name) for name in source.checkpoint.names()}
    return "bf16" if stored == {"BF16"} else "fp32"


@contextmanager
def _model(run: RunConfig, source: Source, chunks: Any) -> Iterator[ParallelModel]:
    """The model to score: `chunks`, or one that is built on the caller's mesh or in this process."""
    from megatron.core import tensor_parallel

    from megatron_ssu.engine.cpu_backend import cpu_backend
    from megatron_ssu.engine.mesh import current_mesh
    from megatron_ssu.engine.ranks import on_all_ranks
    from megatron_ssu.models.borrowed import check_whole_experts, scoring_model
    from megatron_ssu.models.build import DTYPES
    from megatron_ssu.models.hf_import import check_checkpoint
    from megatron_ssu.models.parallel_model import build_model

    with cpu_backend(), _own_mesh():
        if chunks is not None:
            with scoring_model(run, source, chunks) as model:
                yield model
            return
        if not tensor_parallel.get_cuda_rng_tracker().get_states():
            raise UserError(
                "score: megatron's random number generators must be seeded to build the model; call "
                "tensor_parallel.model_parallel_cuda_manual_seed before"
            )
        mesh = current_mesh()
        run.parallel.transformer = {
            "tensor_model_parallel_size": mesh.tensor,
            "pipeline_model_parallel_size": mesh.pipeline,
            "virtual_pipeline_model_parallel_size": mesh.virtual,
            "context_parallel_size": mesh.context,
            "expert_model_parallel_size": mesh.expert,
            "sequence_parallel": mesh.tensor > 1 and source.dims.experts is not None,
        }
        check_whole_experts(source.dims, "score")
        dtype = DTYPES[run.precision.dtype]
        on_all_ranks(lambda: check_checkpoint(source.checkpoint, source.family, source.dims, dtype))
        yield build_model(run, source, mesh)


@contextmanager
def _own_mesh() -> Iterator[None]:
    """Process groups of one while it lasts, unless the caller has initialized megatron's; random numbers go on as before."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    from megatron_ssu.engine.mesh import start_mesh, start_processes, stop_processes

    if parallel_state.model_parallel_is_initialized():
        yield
        return
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "score: with several processes megatron's parallel_state must be initialized; call "
            "parallel_state.initialize_model_parallel before, or score in one process"
        )
    tracker = tensor_parallel.get_cuda_rng_tracker()
    states = tracker.get_states()
    start_processes()
    try:
        with torch.random.fork_rng():
            start_mesh()
            yield
    finally:
        stop_processes()
        tracker.set_states(states)
