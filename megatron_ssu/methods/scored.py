"""From a run file to its scores and its shield: what is missing is made, what is there is checked and used."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from megatron_ssu.config.schema import CalibrationSection, RunConfig
from megatron_ssu.data.calibration import Calibration, load_calibration
from megatron_ssu.data.tokenizer import load_tokenizer
from megatron_ssu.engine.ranks import is_rank_zero, on_all_ranks, on_rank_zero
from megatron_ssu.errors import UserError
from megatron_ssu.methods.options import (
    check_names,
    missing_calibration,
    missing_change,
    missing_target,
    reads_calibration,
    reads_change,
    reads_target,
    wanted_scores,
)
from megatron_ssu.methods.planned import check_choices, check_scores_model, scores_path, shield_path, write_plan
from megatron_ssu.models.family import Dims
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.hf_config import difference
from megatron_ssu.models.parallel_model import ParallelModel
from megatron_ssu.models.source import Source
from megatron_ssu.scoring.change import KEY, open_before
from megatron_ssu.scoring.score_model import Before, score_model
from megatron_ssu.scoring.scores_file import Scores
from megatron_ssu.shield.shield_file import Shield, check_model, load_shield

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Samples:
    """What scores read beside the model's weights; None: not needed."""

    source: Calibration | None
    target: Calibration | None
    before: Before | None

    @property
    def notes(self) -> list[str]:
        """A line for each file with fewer samples than asked for."""
        return [c.note for c in (self.source, self.target) if c is not None and c.note]


def load_samples(run: RunConfig, source: Source, packed: Calibration | None = None) -> Samples:
    """What the scores of a run file read; `packed` source samples in place of those of shield.calibration.

    Raises UserError where the run file does not name what is needed, or it is bad.
    """
    why = reads_calibration(run), reads_target(run), reads_change(run)
    return Samples(
        source=packed or (load_source_samples(run, source.dims) if why[0] else None),
        target=_load_target(run, source.dims, why[1]) if why[1] else None,
        before=_load_before(run, source, why[2]) if why[2] else None,
    )


def load_source_samples(run: RunConfig, dims: Dims) -> Calibration | None:
    """The packed calibration samples of a run file, rows no longer than the model's; None where no score needs any."""
    why = reads_calibration(run)
    if why is None:
        return None
    if run.shield.calibration.path is None:
        raise missing_calibration(why)
    return _load(run, run.shield.calibration, dims)


def _load_target(run: RunConfig, dims: Dims, why: str) -> Calibration:
    if run.shield.target_calibration.path is None:
        raise missing_target(why)
    return _load(run, run.shield.target_calibration, dims)


def _load_before(run: RunConfig, source: Source, why: str) -> Before:
    given = run.shield.change_from
    if given is None:
        raise missing_change(why)
    return Before(open_before(source.path, given), model_fingerprint(given, KEY))


def _load(run: RunConfig, section: CalibrationSection, dims: Dims) -> Calibration:
    """Samples that a section names, with tokens that the model has."""
    assert section.path is not None
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
    return calibration


def make_scores(session: ParallelModel) -> Scores | None:
    """Score the session's model and write the scores file; the scores on rank 0, None elsewhere. Collective.

    A scores file that is there is replaced: see `check_replaceable`.

    Raises:
        UserError: bad calibration data, NaN or infinite values, or a scores file that cannot be written.
    """
    run = session.run
    check_names(run)
    return _score(session, on_all_ranks(lambda: load_samples(run, session.source)))


def _score(session: ParallelModel, samples: Samples) -> Scores | None:
    run = session.run
    for note in samples.notes if is_rank_zero() else ():
        log.warning("%s", note)
    fingerprint = on_rank_zero(lambda: model_fingerprint(session.source.path))
    scores = score_model(
        session, wanted_scores(run), samples.source, fingerprint, target=samples.target, before=samples.before
    )

    def write() -> None:
        unreached = scores.unreached()  # type: ignore[union-attr]
        if unreached:
            log.warning(
                "no calibration token reached %s%s: their inputs count as 0, and which of their columns are frozen says "
                "nothing; give more samples (shield.calibration.samples) where that matters",
                unreached[0],
                f" and {len(unreached) - 1} more weights of idle experts" if len(unreached) > 1 else "",
            )
        path = scores_path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        scores.save(path, overwrite=True)  # type: ignore[union-attr]

    on_rank_zero(write)
    return scores


def make_shield(session: ParallelModel, *, begun: bool = False) -> Shield:
    """The run's shield: `shield.file` when given, else planned into the run directory, scored first where that is missing.

    Only what is missing is made; no scores and no shield that are there are replaced. Collective; every rank opens the
    file. Raises UserError when a given file is damaged or for another model, or when scores or shield are there that do not
    fit the run file.
    """
    run, source = session.run, session.source
    if on_rank_zero(lambda: needs_scoring(run, source, begun=begun)):
        samples = on_all_ranks(lambda: load_samples(run, source))
        scores = _score(session, samples)
        on_rank_zero(lambda: _plan_and_write(run, source, scores, begun))
    else:
        on_rank_zero(lambda: _plan_from_files(run, source, begun))
    return on_all_ranks(lambda: _open_shield(run, source))


def present_shield(run: RunConfig, source: Source) -> Shield | None:
    """The shield of a run that has begun, where it needs no scoring; else None. For one process.

    Raises UserError as `make_shield` does.
    """
    if needs_scoring(run, source, begun=True):
        return None
    _plan_from_files(run, source, begun=True)
    return _open_shield(run, source)


def needs_scoring(run: RunConfig, source: Source, *, begun: bool) -> bool:
    """Whether the run's shield cannot be had without scoring the model: neither a shield that it may take nor scores are there.

    Raises UserError where scores or a shield are there that do not fit the run file: they are not replaced.
    """
    check_names(run)
    if run.shield.file is not None:
        check_model(load_shield(run.shield.file), model_fingerprint(source.path), source.name)
        return False
    scores, shield = scores_path(run), shield_path(run)
    if begun and shield.exists() and not scores.exists():
        check_choices(run, load_shield(shield))
        return False
    if run.shield.scores is not None or scores.exists():
        _check_scores(run, source, begun)
        return False
    if shield.exists():
        raise UserError(
            f"{shield}: is there already, without the scores that it was planned from; name it with shield.file to train "
            "under it, or remove it"
        )
    return True


def _plan_from_files(run: RunConfig, source: Source, begun: bool) -> None:
    """Plan from the scores file; a shield file without one stays as it is."""
    if run.shield.file is None and (run.shield.scores is not None or scores_path(run).exists()):
        _plan_and_write(run, source, Scores.load(scores_path(run)), begun)


def _plan_and_write(run: RunConfig, source: Source, scores: Scores | None, begun: bool) -> None:
    """On the rank that has the scores. Returns no shield, which all ranks would be sent: they read the file."""
    assert scores is not None
    write_plan(run, source, scores, begun=begun)


def _open_shield(run: RunConfig, source: Source) -> Shield:
    shield = load_shield(shield_path(run), check=True)
    check_model(shield, model_fingerprint(source.path), source.name)
    return shield


def _check_scores(run: RunConfig, source: Source, begun: bool) -> None:
    """Raises UserError unless the scores file is there and fits the model, the shield section and the calibration data."""
    path, scores = scores_path(run), Scores.load(scores_path(run))
    check_scores_model(run, source, scores)
    missing = [n for n in wanted_scores(run) if n not in scores.scores]
    why = None
    if missing:
        why = f"has no score {missing[0]}"
    elif run.shield.measures_norms and not any(_of_norm(scores, key) for key in scores.tensors):
        why = f"has no statistics of the norms' inputs, which shield.norms: {run.shield.norms} needs"
    else:
        why = _stale(run, source, scores)
    if why is None:
        return
    if run.shield.scores is not None:
        raise UserError(f"{path}: {why}; run `score` again or leave shield.scores out")
    if begun:
        raise UserError(
            f"{path}: {why}, and the run has begun with it; change that back, or start in another checkpoint.directory"
        )
    raise UserError(f"{path}: {why}; change that back, or run `megatron-ssu score` to replace it")


def _stale(run: RunConfig, source: Source, scores: Scores) -> str | None:
    """What the run file names now that is not what the scores were made with; what it does not name is not compared."""
    shield = run.shield
    if shield.calibration.path is not None:
        calibration = load_source_samples(run, source.dims)
        if calibration is not None and scores.calibration != calibration.digest:
            return "was made with other calibration samples"
    target = reads_target(run)
    if target and shield.target_calibration.path is not None:
        made = scores.setting("target_calibration")["digest"]
        if made != _load_target(run, source.dims, target).digest:
            return "was made with other target samples (shield.target_calibration)"
    if reads_change(run) and shield.change_from is not None:
        made, given = scores.setting("change_from")["fingerprint"], model_fingerprint(shield.change_from, KEY)
        if made != given:
            return f"compares with another checkpoint than shield.change_from: other {difference(made, given)}"
    return None


def check_replaceable(run: RunConfig, source: Source) -> None:
    """Raises UserError where the place of the scores holds anything but scores of this model."""
    if not scores_path(run).exists():
        return
    try:
        scores = Scores.load(scores_path(run))
    except UserError as error:
        reason = str(error).removesuffix("; make it again")
        raise UserError(f"{reason}; it is not replaced: remove it first") from error
    check_scores_model(run, source, scores)


def _of_norm(scores: Scores, key: str) -> bool:
    """Whether a tensor of a scores file is of a norm."""
    return scores.matrices[key.split("/", 2)[2]].is_norm
