"""The table and the pictures of a shield."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from megatron_ssu.errors import UserError
from megatron_ssu.scoring.scores_file import Scores
from megatron_ssu.shield.inspect import Inspection, inspect_shield, overlap_of
from megatron_ssu.shield.mask import Mask
from megatron_ssu.shield.plan import PlanOptions, ProtectRule, plan_shield
from megatron_ssu.shield.plots import draw_all
from tests.unit.samples import further_scores, matrices, scores_of, weights_of

Q1 = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def scores() -> Scores:
    members = matrices(layers=12)
    return scores_of(members, weights_of(members))


def text_of(inspection: Inspection, width: int = 130, **options) -> str:
    console = Console(file=io.StringIO(), width=width)
    inspection.render(console, **options)
    return console.file.getvalue()


def png_size(path) -> tuple[int, int]:
    raw = path.read_bytes()
    assert raw.startswith(b"\x89PNG") and raw.rstrip(b"\0")[-8:-4] == b"IEND"
    return int.from_bytes(raw[16:20], "big"), int.from_bytes(raw[20:24], "big")


def test_margin_and_range_are_those_of_the_scores(scores):
    shield = plan_shield(scores, PlanOptions(ratio=0.4), method="ssu")
    (view,) = [v for v in inspect_shield(shield, scores).views if v.matrix.name == Q1]
    values = np.sort(scores.column("wanda", Q1))[::-1]
    assert (view.units, view.frozen_units, view.ratio) == (20, 8, 0.4)
    assert view.scores.last_frozen == pytest.approx(values[7], rel=1e-4)
    assert view.scores.first_trainable == pytest.approx(values[8], rel=1e-4)
    assert view.scores.margin == pytest.approx(1 - values[8] / values[7], abs=1e-4)


def test_margin_of_ties_is_zero_and_of_another_score_negative(scores):
    shield = plan_shield(scores, PlanOptions(score="random"), method="ssu")
    margins = [v.scores.margin for v in inspect_shield(shield, scores, score="wanda").views]
    assert min(margins) < 0
    for key, value in scores.tensors.items():
        scores.tensors[key] = np.ones_like(value)
    shield = plan_shield(scores, PlanOptions(), method="ssu")
    assert all(v.scores.margin == 0 for v in inspect_shield(shield, scores).views)
    for ratio in (0.0, 1.0):  # no cut inside
        shield = plan_shield(scores, PlanOptions(ratio=ratio), method="ssu")
        assert all(v.scores.margin is None for v in inspect_shield(shield, scores).views)


@pytest.mark.parametrize("kinds", [("column", "column"), ("row", "element"), ("column", "row")])
def test_overlap_counts_elements(kinds):
    rng = np.random.default_rng(0)
    shape = (9, 13)
    units = {"column": 13, "row": 9, "element": 117}
    a, b = (Mask.of(kind, shape, rng.random(units[kind]) < 0.5) for kind in kinds)
    overlap = overlap_of(a, b)
    both, either = (a.full() & b.full()).sum(), (a.full() | b.full()).sum()
    assert overlap.jaccard == both / either and overlap.share == both / a.full().sum()
    assert overlap_of(a, None).jaccard == 0
    empty = Mask.constant("column", shape, False)
    assert overlap_of(empty, empty).jaccard == 1


def test_table_has_a_line_for_every_matrix(scores):
    rules = [ProtectRule("layers:3", "frozen")]
    shield = plan_shield(scores, PlanOptions(protect=rules), method="ssu")
    other = plan_shield(scores, PlanOptions(score="random", granularity="row"), method="ssu")
    inspection = inspect_shield(shield, scores, other)
    text = text_of(inspection)
    head, table = text.split("by kind, over all layers")[0].splitlines(), text.split("by kind, over all layers")[1]
    assert sum("_proj" in line for line in head) == 12 * 7 and sum("100.00%" in line for line in head) == 8
    assert max(map(len, text.splitlines())) <= 130 and "…" not in text
    assert [line.split()[0] for line in table.splitlines() if "_proj" in line] == inspection.kinds()[:7]
    few = text_of(inspection, layers=[2])
    assert sum("_proj" in line for line in few.split("by kind")[0].splitlines()) == 7
    assert text_of(inspect_shield(shield)).count("up_proj") == 13
    value = json.loads(json.dumps(inspection.to_dict()))
    assert len(value["matrices"]) == len(shield.matrices) and value["realised"]["linear"]["ratio"] > 0.5


@pytest.mark.parametrize("layers", [2, 80])
def test_pictures(tmp_path, layers):
    members = matrices(layers=layers)
    scores = scores_of(members, weights_of(members))
    rows = {"model.embed_tokens.weight": ((36, 20), [1])}
    shield = plan_shield(scores, PlanOptions(budget="layerwise", norms="frozen"), method="ssu", frozen_rows=rows)
    other = plan_shield(scores, PlanOptions(score="magnitude"), method="ssu")
    paths = draw_all(inspect_shield(shield, scores, other), tmp_path / "pictures")
    assert [p.name for p in paths] == ["frozen_share.png", "scores.png", "overlap.png"]
    for path in paths:
        width, height = png_size(path)
        assert width >= 600 and (height > 1500 if layers == 80 else height < 1000)
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == sorted(p.name for p in paths)


def test_pictures_of_degenerate_scores(tmp_path, scores):
    for key, value in scores.tensors.items():
        scores.tensors[key] = np.zeros_like(value) if "layers.1" in key else np.ones_like(value)
    assert len(draw_all(inspect_shield(plan_shield(scores, PlanOptions(), method="ssu"), scores), tmp_path)) == 2


def test_element_shields_show_without_scores(tmp_path, scores):
    shield = plan_shield(scores, PlanOptions(score="random", granularity="element"), method="ssu")
    inspection = inspect_shield(shield, scores)
    assert all(v.scores is None for v in inspection.views)
    assert [p.name for p in draw_all(inspection, tmp_path)] == ["frozen_share.png"]
    assert "element" in text_of(inspection)


@pytest.mark.parametrize("score", ["snr", "change", "fisher"])
@pytest.mark.parametrize("freeze", ["highest", "lowest"])
def test_shields_by_matrix_and_layer_show_the_cut_of_what_is_ranked(scores, tmp_path, score, freeze):
    weights = weights_of(scores.matrices)
    further_scores(scores, weights, weights_of(scores.matrices, seed=1))
    rules = [ProtectRule("layers:3", "frozen")]
    for granularity in ("matrix", "layer"):
        options = PlanOptions(score=score, granularity=granularity, freeze=freeze, protect=rules)
        inspection = inspect_shield(plan_shield(scores, options, method="ssu"), scores)
        views = [v for v in inspection.views if v.matrix.scored]
        assert all(v.scores is None for v in views if v.matrix.layer == 3)
        ranked = [v for v in views if v.matrix.layer != 3]
        assert all(v.scores.margin > 0 and v.scores.values.size == 1 for v in ranked)
        cuts = {v.scores.last_frozen for v in ranked}
        assert len(cuts) == (7 if granularity == "matrix" else 1)
        for view in ranked:
            above = (view.scores.values[0] >= view.scores.last_frozen) == (freeze == "highest")
            assert above == view.scores.frozen[0] or view.scores.values[0] == view.scores.last_frozen
        text = text_of(inspection)
        assert f"by {granularity}" in text and "nan" not in text
        assert [p.name for p in draw_all(inspection, tmp_path)] == ["frozen_share.png", "scores.png"]


def test_lowest_shows_the_cut_from_below(scores):
    shield = plan_shield(scores, PlanOptions(ratio=0.4, freeze="lowest"), method="ssu")
    (view,) = [v for v in inspect_shield(shield, scores).views if v.matrix.name == Q1]
    values = np.sort(scores.column("wanda", Q1))
    assert view.scores.last_frozen == values[7] and view.scores.first_trainable == values[8]
    assert view.scores.margin == pytest.approx(1 - values[7] / values[8])


def test_what_does_not_fit_is_refused(scores):
    shield = plan_shield(scores, PlanOptions(), method="ssu")
    foreign = plan_shield(scores, PlanOptions(), method="ssu")
    foreign.model, foreign.fingerprint = "other", "00" * 32
    with pytest.raises(UserError, match=r"made for model other .* not for tiny"):
        inspect_shield(shield, scores, foreign)
    with pytest.raises(UserError, match="the shield: made for model other, but the scores are of model tiny"):
        inspect_shield(foreign, scores)
    with pytest.raises(UserError, match="no score hessian in the scores file; name one with --score: wanda"):
        inspect_shield(shield, scores, score="hessian")
    with pytest.raises(UserError, match="without a scores file"):
        inspect_shield(shield, score="wanda")
