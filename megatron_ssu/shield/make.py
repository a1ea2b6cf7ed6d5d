"""From a run file to its scores and its shield: what is missing is made, what is there is checked and used."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_ssu import runtime
from megatron_ssu.config.schema import RunConfig
from megatron_ssu.data.chat import Calibration, load_calibration
from megatron_ssu.data.tokenizer import load_tokenizer
from megatron_ssu.errors import UserError
from megatron_ssu.models.family import Dims
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.scoring import base
from megatron_ssu.scoring.calibrate import score_model
from megatron_ssu.scoring.file import Scores
from megatron_ssu.session import Session, Source
from megatron_ssu.shield.file import Shield, check_model, load_shield
from megatron_ssu.shield.options import check_names, plan_options
from megatron_ssu.shield.plan import plan_shield

log = logging.getLogger(__name__)


def scores_path(run: RunConfig) -> Path:
    return Path(run.shield.scores or Path(run.checkpoint.directory) / "scores.safetensors")


def shield_path(run: RunConfig) -> Path:
    return Path(run.shield.file or Path(run.checkpoint.directory) / "shield.safetensors")


def wanted_scores(run: RunConfig) -> list[str]:
    """Scores that a `score` run computes: those named, without the ones that are drawn when a shield is planned."""
    names = [run.shield.score, *run.shield.also_score]
    return sorted({n for n in names if n not in base.DRAWN})


def load_samples(run: RunConfig, dims: Dims) -> Calibration | None:
    """The packed calibration samples of a run file, rows no longer than the model's; None where no score needs any."""
    needed = [n for n in wanted_scores(run) if base.needs_calibration([n])]
    if not needed and run.shield.norms != "half":
        return None
    section = run.shield.calibration
    if section.path is None:
        why = f"the score {needed[0]}" if needed else "shield.norms: half"
        raise UserError(f"shield.calibration.path: needed for {why}; name a file of source chats")
    tokenizer = load_tokenizer(run.model.path, trust_remote_code=run.model.trust_remote_code)
    calibration = load_calibration(
        section.path,
        tokenizer,
        samples=section.samples,
        sequence_length=min(section.sequence_length, dims.positions),
        seed=section.seed,
    )
    largest = int(calibration.tokens.max())
    if largest >= dims.vocab:
        raise UserError(
            f"{run.model.path}: the tokenizer makes token {largest} of {section.path}, config.json's vocab_size is "
            f"{dims.vocab}; take the model's own tokenizer"
        )
    if calibration.note and runtime.is_rank_zero():
        log.warning("%s", calibration.note)
    return calibration


def make_scores(session: Session) -> Scores | None:
    """Score the session's model and write the scores file; the scores on rank 0, None elsewhere. Collective.

    Raises:
        UserError: bad calibration data, NaN or infinite values, or a scores file that cannot be written.
    """
    run = session.run
    base.check_names([run.shield.score, *run.shield.also_score])
    calibration = runtime.on_all_ranks(lambda: load_samples(run, session.source.dims))
    return _score(session, calibration)


def _score(session: Session, calibration: Calibration | None) -> Scores | None:
    run = session.run
    fingerprint = runtime.on_rank_zero(lambda: model_fingerprint(session.source.path))
    scores = score_model(session, wanted_scores(run), calibration, fingerprint)

    def write() -> None:
        path = scores_path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        scores.save(path, overwrite=True)  # type: ignore[union-attr]

    runtime.on_rank_zero(write)
    return scores


def plan(run: RunConfig, source: Source, scores: Scores, *, method: str = "ssu") -> Shield:
    """A shield for the run's model out of scores. Raises UserError for scores of another model."""
    fingerprint = model_fingerprint(source.path)
    if scores.fingerprint != fingerprint:
        raise UserError(
            f"{scores_path(run)}: scores of model {scores.model} (fingerprint {scores.fingerprint[:12]}), not of "
            f"{source.name} ({fingerprint[:12]}); score this model"
        )
    return plan_shield(
        scores,
        plan_options(run),
        method=method,
        frozen_rows=special_token_rows(run, source),
        weights=source.checkpoint.get,
    )


def special_token_rows(run: RunConfig, source: Source) -> dict[str, tuple[tuple[int, ...], list[int]]]:
    """Rows of embedding and head that the chat template's special tokens use: name -> (shape, rows)."""
    if not run.shield.special_tokens:
        return {}
    tokenizer = load_tokenizer(run.model.path, trust_remote_code=run.model.trust_remote_code)
    if not tokenizer.has_chat_template:
        log.warning("%s: no chat template, so no special-token rows are frozen", run.model.path)
        return {}
    rows = tokenizer.special_token_ids_of_chat_template()
    matrices = source.family.matrices(source.dims)
    return {m.name: (m.shape, rows) for m in matrices if m.kind in ("embedding", "head") and rows}


def make_shield(session: Session, *, begun: bool = False) -> Shield:
    """The run's shield: `shield.file` when given, else planned into the run directory, scored first where that is missing.

    Collective; every rank opens the file. Raises UserError when a given file is damaged or for another model, or when the
    run has `begun` and its scores or shield would come out others.
    """
    run, source = session.run, session.source
    runtime.on_rank_zero(lambda: check_names(run))
    planned = begun and runtime.on_rank_zero(lambda: shield_path(run).exists() and not scores_path(run).exists())
    if run.shield.file is None and not planned:
        base.check_names([run.shield.score, *run.shield.also_score])
        scored = run.shield.calibration.path is None and runtime.on_rank_zero(scores_path(run).exists)
        calibration = None if scored else runtime.on_all_ranks(lambda: load_samples(run, source.dims))
        usable = runtime.on_rank_zero(lambda: _scores_are_usable(run, source, calibration, begun))
        scores = None if usable else _score(session, calibration)
        runtime.on_rank_zero(lambda: write_plan(run, source, scores or Scores.load(scores_path(run)), begun=begun))

    def load() -> Shield:
        shield = load_shield(shield_path(run), check=True)
        check_model(shield, model_fingerprint(source.path), source.name)
        return shield

    return runtime.on_all_ranks(load)


def write_plan(run: RunConfig, source: Source, scores: Scores, *, replace: bool = False, begun: bool = False) -> Shield:
    """Plan and write the shield file; one that says the same is left as it is.

    Raises UserError where it says otherwise, unless it may be `replace`d and the run has not `begun`, and for scores
    that do not fit.
    """
    wanted, path = run.shield.score, shield_path(run)
    if wanted not in (*base.DRAWN, *scores.scores):
        raise UserError(
            f"{scores_path(run)}: has no score {wanted}, only {', '.join(scores.scores)}; run `score` with "
            f"shield.score={wanted}"
        )
    shield = plan(run, source, scores)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and load_shield(path).digest() == shield.digest():
        return shield
    if path.exists() and (begun or not replace):
        which, advice = "the run began under this shield", "start in another checkpoint.directory"
        if not begun:
            which, advice = "is there already", "name it with shield.file to train under it, or remove it"
        raise UserError(f"{path}: {which}, and the shield section asks for another now; change it back, or {advice}")
    shield.save(path, overwrite=True)
    return shield


def _scores_are_usable(run: RunConfig, source: Source, calibration: Calibration | None, begun: bool) -> bool:
    """Whether the scores file is there and fits model and calibration data; one that the user named must, and that of a run
    that has begun."""
    path = scores_path(run)
    if not path.exists() and run.shield.scores is None:
        return False
    scores = Scores.load(path)
    missing = [n for n in wanted_scores(run) if n not in scores.scores]
    why = None
    if scores.fingerprint != model_fingerprint(source.path):
        why = f"was made for another model, {scores.model}"
    elif missing:
        why = f"has no score {missing[0]}"
    elif run.shield.norms == "half" and not any(_of_norm(scores, key) for key in scores.tensors):
        why = "has no statistics of the norms' inputs, which shield.norms: half needs"
    elif calibration is not None and scores.calibration != calibration.digest:
        why = "was made with other calibration samples"
    if why is not None and run.shield.scores is not None:
        raise UserError(f"{path}: {why}; run `score` again or leave shield.scores out")
    if why is not None and begun:
        raise UserError(
            f"{path}: {why}, and the run has begun with it; change that back, or start in another checkpoint.directory"
        )
    if why is not None:
        log.warning("%s: %s; scoring anew", path, why)
    return why is None


def _of_norm(scores: Scores, key: str) -> bool:
    """Whether a tensor of a scores file is of a norm."""
    return scores.matrices[key.split("/", 2)[2]].kind == "norm"
