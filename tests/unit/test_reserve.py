"""shield.reserve: what earlier shields let train is frozen first, and counts in what the budget gives."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ssu.errors import UserError
from megatron_ssu.shield.mask import Mask
from megatron_ssu.shield.plan import PlanOptions, plan_shield
from megatron_ssu.shield.ranking import freeze_units
from megatron_ssu.shield.shield_file import Shield
from tests.unit.samples import matrices, scores_of, weights_of

DRAW = np.random.default_rng(7)


def make_scores():
    found = matrices()
    return scores_of(found, weights_of(found))


def earlier(scores, granularity="column", fraction=0.75, rows=False):
    """A shield that freezes a random `fraction` of every linear matrix."""
    masks = {}
    for name, m in scores.matrices.items():
        if m.scored:
            units = Mask.constant(granularity, m.shape, False).units
            masks[name] = Mask.of(granularity, m.shape, DRAW.permutation(units) < int(fraction * units))
    matrices = {name: scores.matrices[name] for name in masks}
    return Shield("ssu", scores.model, scores.fingerprint, matrices, masks)


@pytest.mark.parametrize("granularity", ["column", "row"])
@pytest.mark.parametrize(
    ("ratio", "budget"), [(0.75, "uniform"), (0.5, "uniform"), (0.125, "uniform"), (0.5, "layerwise")]
)
def test_reserved_units_are_frozen_first(tmp_path, granularity, ratio, budget):
    scores = make_scores()
    shields = [earlier(scores, granularity, 0.75), earlier(scores, granularity, 0.875)]
    for number, shield in enumerate(shields):
        shield.save(tmp_path / f"{number}.safetensors")
    files = [str(tmp_path / f"{number}.safetensors") for number in range(2)]
    options = PlanOptions(granularity=granularity, ratio=ratio, budget=budget)
    plain = plan_shield(scores, options, method="ssu")
    found = plan_shield(
        scores, PlanOptions(granularity=granularity, ratio=ratio, budget=budget, reserve=files), method="ssu"
    )
    for name, mask in found.masks.items():
        reserved = np.any([~shield.masks[name].bits() for shield in shields], axis=0)
        values = scores.get("wanda", granularity, name)
        count = max(plain.masks[name].frozen_units, int(reserved.sum()))
        ranked = np.where(reserved, np.inf, values)  # the oracle: reserved units rank above all others
        expected = set(np.argsort(-ranked, kind="stable")[:count])
        assert set(np.flatnonzero(mask.bits())) == expected
    assert found.plan["reserve"] == [shield.digest() for shield in shields]


def test_a_whole_matrix_goes_with_every_granularity(tmp_path):
    scores = make_scores()
    shield = earlier(scores)
    name = next(iter(shield.masks))
    shield.masks[name] = Mask.constant("row", shield.matrices[name].shape, True)
    shield.counts = {}
    shield.__post_init__()
    shield.save(tmp_path / "s.safetensors")
    found = plan_shield(scores, PlanOptions(reserve=[str(tmp_path / "s.safetensors")]), method="ssu")
    count = found.masks[name].frozen_units
    assert (found.masks[name].columns() == freeze_units(scores.column("wanda", name), count)).all()


def test_what_does_not_fit_is_refused(tmp_path):
    scores = make_scores()
    earlier(scores, "row").save(tmp_path / "rows.safetensors")
    with pytest.raises(
        UserError, match=r"shield\.reserve: .*rows\.safetensors: freezes .* by row; set shield\.granularity"
    ):
        plan_shield(scores, PlanOptions(reserve=[str(tmp_path / "rows.safetensors")]), method="ssu")
    with pytest.raises(
        UserError, match=r"shield\.reserve: goes with shield\.granularity column, row, element, got layer"
    ):
        plan_shield(scores, PlanOptions(granularity="layer", reserve=["x"]), method="ssu")
