"""A run's shield file out of its scores file. Imports no megatron-core, and torch for weights alone."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from megatron_ssu.config.schema import RunConfig
from megatron_ssu.data.tokenizer import load_tokenizer
from megatron_ssu.errors import UserError
from megatron_ssu.methods.options import missing_change, plan_options
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.hf_config import difference
from megatron_ssu.models.source import Source
from megatron_ssu.scoring.change import KEY, open_before
from megatron_ssu.scoring.registry import score_named
from megatron_ssu.scoring.scores_file import Scores
from megatron_ssu.shield.mask import Mask
from megatron_ssu.shield.plan import choices, plan_shield
from megatron_ssu.shield.ranking import Weights
from megatron_ssu.shield.shield_file import Shield, load_shield

log = logging.getLogger(__name__)

_CHOICES = {
    "norms",
    "biases",
    "protect",
    "kinds",
    "floor",
    "ceiling",
    "freeze",
    "seed",
    "reserve",
}  # keys of the shield section in a plan


def scores_path(run: RunConfig) -> Path:
    return Path(run.shield.scores or Path(run.checkpoint.directory) / "scores.safetensors")


def shield_path(run: RunConfig) -> Path:
    return Path(run.shield.file or Path(run.checkpoint.directory) / "shield.safetensors")


def plan(run: RunConfig, source: Source, scores: Scores) -> Shield:
    """A shield for the run's model out of its scores."""
    return plan_shield(
        scores,
        plan_options(run),
        method=run.method.name,
        frozen_rows=special_token_rows(run, source),
        weights=source.checkpoint.get,
        before=weights_before(run, source, scores),
    )


def weights_before(run: RunConfig, source: Source, scores: Scores) -> Weights | None:
    """Weights of the checkpoint that single elements are compared with; None where that is not asked for."""
    if score_named(run.shield.score).needs != "change":
        return None
    _check_change(run, scores)
    if run.shield.granularity != "element":
        return None
    if run.shield.change_from is None:
        raise missing_change(f"the score {run.shield.score!r}")
    return open_before(source.path, run.shield.change_from).get


def _check_change(run: RunConfig, scores: Scores) -> None:
    """Raises UserError where the scores compare with another checkpoint than the one that the run file names."""
    made, given = scores.setting("change_from"), run.shield.change_from
    fingerprint = model_fingerprint(given, KEY) if given is not None else made["fingerprint"]
    if fingerprint != made["fingerprint"]:
        raise UserError(
            f"{scores_path(run)}: compares with {made['model']}, and {KEY} names {given}: other "
            f"{difference(made['fingerprint'], fingerprint)}; change that back, or score again"
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


def special_token_masks(run: RunConfig, source: Source) -> dict[str, Mask]:
    """The same as masks."""
    masks = {}
    for name, (shape, rows) in special_token_rows(run, source).items():
        frozen = np.zeros(shape[0], dtype=bool)
        frozen[rows] = True
        masks[name] = Mask.of("row", shape, frozen)
    return masks


def check_choices(run: RunConfig, shield: Shield) -> None:
    """Raises UserError where the shield was planned with other choices than the run file's; for one without its scores."""
    options = plan_options(run)
    asked = {key: getattr(options, key) for key in ("score", "granularity", "budget", "ratio")} | choices(options)
    made = {key: getattr(shield, key) for key in ("score", "granularity", "budget", "ratio")} | shield.plan
    for key in dict.fromkeys((*asked, *(set(made) & _CHOICES))):
        if asked.get(key) != made.get(key):
            raise UserError(
                f"{shield_path(run)}: was planned with shield.{key} {made.get(key)}, the run file has {asked.get(key)}; change "
                "that back, or start in another checkpoint.directory"
            )


def write_plan(run: RunConfig, source: Source, scores: Scores, *, replace: bool = False, begun: bool = False) -> Shield:
    """Plan and write the shield file; one that says the same is left as it is.

    Raises UserError where it says otherwise, unless it may be `replace`d and the run has not `begun`, and for scores
    that do not fit. A shield of another model is never replaced.
    """
    wanted, path = run.shield.score, shield_path(run)
    if score_named(wanted).needs != "seed" and wanted not in scores.scores:
        raise UserError(
            f"{scores_path(run)}: has no score {wanted}, only {', '.join(scores.scores)}; run `score` with "
            f"shield.score={wanted}"
        )
    check_scores_model(run, source, scores)
    present = load_shield(path) if path.exists() else None
    if present is not None and present.fingerprint != scores.fingerprint:
        raise UserError(
            f"{path}: was made for another model, {present.model}: other "
            f"{difference(present.fingerprint, scores.fingerprint)}; choose another checkpoint.directory, or remove it"
        )
    if present is not None and present.method != run.method.name:
        raise UserError(
            f"{path}: is the shield of method {present.method} and is not replaced; choose another checkpoint.directory, or "
            "remove it"
        )
    shield = plan(run, source, scores)
    path.parent.mkdir(parents=True, exist_ok=True)
    if present is not None and present.digest() == shield.digest():
        return shield
    if present is not None and (begun or not replace):
        which, advice = "the run began under this shield", "start in another checkpoint.directory"
        if not begun:
            which, advice = "is there already", "name it with shield.file to train under it, or remove it"
        raise UserError(f"{path}: {which}, and the shield section asks for another now; change it back, or {advice}")
    shield.save(path, overwrite=True)
    return shield


def check_scores_model(run: RunConfig, source: Source, scores: Scores) -> None:
    """Raises UserError for scores of another model than the run's."""
    fingerprint = model_fingerprint(source.path)
    if scores.fingerprint != fingerprint:
        advice = "leave shield.scores out, or name scores of this model"
        if run.shield.scores is None:
            advice = "they are not replaced: choose another checkpoint.directory, or remove the file"
        raise UserError(
            f"{scores_path(run)}: scores of model {scores.model}, not of {source.name}: other "
            f"{difference(scores.fingerprint, fingerprint)}; {advice}"
        )
