"""Planning: what is frozen, exactly; budgets, protection, norms; and composing shields."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_ssu.errors import UserError
from megatron_ssu.models.matrix import Matrix
from megatron_ssu.scoring.scores_file import Scores
from megatron_ssu.shield.budget import layerwise_counts, units_of_ratio
from megatron_ssu.shield.compose import compose
from megatron_ssu.shield.plan import PlanOptions, plan_shield
from megatron_ssu.shield.ranking import TIE, freeze_units
from megatron_ssu.shield.select import ProtectRule, select
from megatron_ssu.shield.shield_file import Shield, load_shield
from tests.unit.samples import further_scores, matrices, scores_of, weights_of

UP0 = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return weights_of(matrices())


@pytest.fixture
def scores(weights) -> Scores:
    return scores_of(matrices(), weights)


@pytest.fixture(scope="module")
def before(weights) -> dict[str, torch.Tensor]:
    return weights_of(matrices(), seed=1)


def plan(scores: Scores, weights=None, before=None, **options) -> Shield:
    given = {"weights": weights, "before": before}
    lookups = {key: values.__getitem__ for key, values in given.items() if values is not None}
    return plan_shield(scores, PlanOptions(**options), method="ssu", **lookups)


def top(values: np.ndarray, count: int) -> np.ndarray:
    """The plain way: sort, and what lies within TIE of the last one taken goes by position."""
    values, frozen = values.reshape(-1).tolist(), np.zeros(values.size, dtype=bool)
    if count:
        cut = sorted(values, reverse=True)[count - 1]
        values = [cut if abs(v - cut) <= TIE * cut else v for v in values]
    frozen[sorted(range(len(values)), key=lambda j: (-values[j], j))[:count]] = True
    return frozen


def test_units_of_ratio_is_the_floor_of_the_decimal():
    for ratio in (0, 0.125, 0.5, 0.875, 1, 1.0):
        for units in (0, 1, 7, 20, 5120, 13824):
            assert units_of_ratio(ratio, units) == math.floor(ratio * units)
    assert units_of_ratio(0.29, 100) == 29  # 0.29 * 100 is 28.999999999999996 in floating point
    assert units_of_ratio(0.57, 100) == 57
    assert units_of_ratio(0.1, 7) == 0


@pytest.mark.parametrize("ratio", [0.0, 0.125, 0.5, 0.73, 1.0])
@pytest.mark.parametrize("granularity", ["column", "row"])
def test_uniform_freezes_the_top_floor_of_every_matrix(scores, ratio, granularity):
    shield = plan(scores, ratio=ratio, granularity=granularity)
    assert set(shield.masks) == {n for n, m in scores.matrices.items() if m.scored}
    for name, mask in shield.masks.items():
        values = scores.get("wanda", granularity, name)
        np.testing.assert_array_equal(mask.bits(), top(values, math.floor(ratio * values.size)), err_msg=name)


@pytest.mark.parametrize(
    "score",
    [
        "wanda",
        "wanda-released",
        "magnitude",
        "magnitude-released",
        "sparsegpt-diagonal",
        "sparsegpt-diagonal-released",
        "fisher",
        "change",
        "target-contrast",
    ],
)
def test_element_scores(scores, weights, before, score):
    further_scores(scores, weights, before)
    shield = plan(scores, weights, before, score=score, granularity="element", ratio=0.3)
    for name, mask in shield.masks.items():
        weight = weights[name].double().abs().numpy()
        tensors = {k.rsplit("/", 1)[0]: v for k, v in scores.tensors.items() if k.endswith(name)}
        source, target = (weight * tensors[f"{which}input_norm/column"] for which in ("", "target_"))
        expected = {
            "wanda": weight * tensors["input_norm/column"],
            "wanda-released": weight * (1 + tensors["input_mean_square/column"]),
            "magnitude": weight,
            "magnitude-released": weight,
            "sparsegpt-diagonal": np.ones_like(weight) * tensors["sparsegpt-diagonal/column"],
            "sparsegpt-diagonal-released": np.ones_like(weight) * tensors["sparsegpt-diagonal/column"],
            "change": (weights[name].double() - before[name].double()).abs().numpy(),
            "target-contrast": (source / source.mean() + 0.01) / (target / target.mean() + 0.01),
            "fisher": np.outer(tensors["fisher/row"], tensors["fisher/column"]),
        }[score]
        count = math.floor(0.3 * weight.size)
        got, want = mask.elements().reshape(-1), top(expected, count)
        assert got.sum() == count
        if score.removesuffix("-released") in ("magnitude", "sparsegpt-diagonal"):
            np.testing.assert_array_equal(got, want)  # exact in float32
        else:
            assert (got != want).sum() <= 2, name  # float32 products may order two near ties otherwise


def test_random_needs_nothing_but_names_and_seed(scores):
    empty = replace(scores, tensors={}, scores=[])
    for granularity in ("column", "row", "element", "matrix", "layer"):
        one, two = (plan(s, score="random", granularity=granularity, seed=5) for s in (scores, empty))
        other = plan(scores, score="random", granularity=granularity, seed=6)
        assert one.digest() == two.digest() != other.digest()
        assert one.realised()["linear"]["ratio"] == 0.5


def test_equal_scores_freeze_the_lower_numbers(scores, weights):
    for key, value in scores.tensors.items():
        scores.tensors[key] = np.ones_like(value)
    for granularity in ("column", "row"):
        for mask in plan(scores, granularity=granularity).masks.values():
            assert mask.bits()[: mask.units // 2].all() and not mask.bits()[mask.units // 2 :].any()
    constant = {n: torch.full_like(w, -0.5) for n, w in weights.items()}
    for mask in plan(scores, constant, granularity="element").masks.values():
        assert mask.bits()[: mask.units // 2].all() and not mask.bits()[mask.units // 2 :].any()


def test_ties_survive_the_rounding_noise_of_a_mesh(scores):
    rng = np.random.default_rng(0)
    exact, noisy = ({}, {})
    for key, value in scores.tensors.items():
        exact[key] = np.round(np.abs(value)) + 1.0  # many ties
        noisy[key] = exact[key] * (1 + rng.uniform(-2e-7, 2e-7, value.shape))
    for budget in ("uniform", "layerwise"):
        one = plan(replace(scores, tensors=exact), budget=budget)
        two = plan(replace(scores, tensors=noisy), budget=budget)
        assert one.digest() == two.digest()


def test_freeze_units_equals_sorting():
    rng = np.random.default_rng(1)
    for size in (1, 2, 17, 200):
        values = rng.integers(0, 6, size).astype(np.float64) * 0.37
        for count in {0, 1, size // 3, size // 2, size - 1, size}:
            np.testing.assert_array_equal(freeze_units(values, count), top(values, count))
            np.testing.assert_array_equal(freeze_units(values, count, "lowest"), top(2.0 - values, count))


def test_values_within_the_tolerance_of_the_cut_are_one_tie():
    values = np.array(
        [1.0, 2.0 * (1 - TIE / 2), 3.0, 2.0, 2.0 * (1 + TIE / 2), 2.0 * (1 + 3 * TIE), 2.0 * (1 - 3 * TIE)]
    )
    assert freeze_units(values, 4).tolist() == [False, True, True, True, False, True, False]
    assert freeze_units(values, 5).tolist() == [False, True, True, True, True, True, False]
    assert freeze_units(values, 3, "lowest").tolist() == [True, True, False, False, False, False, True]
    assert freeze_units(values, 4, "lowest").tolist() == [True, True, False, True, False, False, True]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bad_scores_and_weights_name_the_matrix(scores, weights, value):
    broken = {n: w.clone() for n, w in weights.items()}
    broken[UP0][3, 4] = value
    with pytest.raises(UserError, match=f"{UP0}: the weights hold NaN or infinite"):
        plan(scores, broken, granularity="element")
    scores.tensors[f"wanda/column/{UP0}"][2] = value
    for budget in ("uniform", "layerwise"):
        with pytest.raises(UserError, match=f"wanda of {UP0} is NaN or infinite .*column 2"):
            plan(scores, budget=budget)


@pytest.mark.parametrize("ratio", [-0.1, 1.5, math.nan, math.inf, "half", True, None])
def test_ratio_outside_0_to_1(scores, ratio):
    with pytest.raises(UserError, match=r"^shield.ratio: .* from 0 to 1"):
        plan(scores, ratio=ratio)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "block"}, "shield.granularity: 'block' is unknown; choose one of column, row, element"),
        ({"budget": "global"}, "shield.budget: 'global' is unknown"),
        ({"norms": "some"}, "shield.norms: 'some' is unknown"),
        ({"granularity": "block"}, "column, row, element, matrix, layer"),
        ({"freeze": "both"}, "shield.freeze: 'both' is unknown; choose one of highest, lowest"),
        ({"score": "hessian"}, "shield.score: 'hessian' is unknown; choose from wanda, .*snr"),
        ({"score": "snr"}, "'snr' has no column scores, only matrix, layer; choose one of wanda, .*random, or another"),
        ({"score": "snr", "granularity": "matrix"}, "no snr by matrix for .*; it has"),
        ({"score": "change", "granularity": "element"}, "the header lacks change_from|needs the weights"),
        (
            {"granularity": "matrix", "budget": "layerwise"},
            "shield.budget: must be uniform or per-kind with .* matrix, got",
        ),
        (
            {"granularity": "layer", "budget": "per-kind"},
            "shield.budget: must be uniform with shield.granularity layer, got",
        ),
        ({"budget": "layerwise", "freeze": "lowest"}, "shield.freeze: must be highest with shield.budget layerwise"),
        ({"score": "sparsegpt-diagonal", "granularity": "row"}, "no sparsegpt-diagonal by row"),
        ({"granularity": "element"}, "element needs the weights"),
        ({"norms": "half"}, "half needs the norms' weights"),
        ({"kinds": {"mlp": 0.1}}, "only applies to shield.budget: per-kind"),
        ({"budget": "per-kind", "kinds": {"mpl": 0.1}}, "shield.kinds.mpl: no such kind .* attention, mlp, down_proj"),
        ({"budget": "per-kind", "kinds": {"mlp": 1.1}}, "shield.kinds.mlp: must be a fraction from 0 to 1, got 1.1"),
        ({"budget": "layerwise", "floor": 0.6}, "0.5 does not lie between shield.floor 0.6 and shield.ceiling 1.0"),
        ({"budget": "layerwise", "ceiling": 0.4}, "does not lie between"),
        ({"protect": [ProtectRule("embeddings", "half")]}, "must be frozen or trainable"),
        ({"protect": [ProtectRule("*.qkv.weight", "frozen")]}, r"'\*.qkv.weight' fits no weight"),
        ({"protect": [ProtectRule("layers:1-2", "frozen")]}, "outside layers 0-1"),
        ({"protect": [ProtectRule("layers:x", "frozen")]}, "must be a range of layers"),
    ],
)
def test_impossible_options(scores, options, message):
    with pytest.raises(UserError, match=message) as caught:
        plan(scores, **options)
    assert "\n" not in str(caught.value)


def test_per_kind(scores):
    shield = plan(scores, budget="per-kind", ratio=0.5, kinds={"attention": 0.25, "k_proj": 0.75, "up_proj": 0.0})
    want = {"q_proj": 0.25, "k_proj": 0.75, "v_proj": 0.25, "o_proj": 0.25}
    want |= {"gate_proj": 0.5, "up_proj": 0.0, "down_proj": 0.5}
    for name, matrix in shield.matrices.items():
        assert shield.masks[name].frozen_units == math.floor(want[matrix.kind] * matrix.shape[1])
    assert shield.plan["kinds"] == {"attention": 0.25, "k_proj": 0.75, "up_proj": 0.0}


@pytest.mark.parametrize("granularity", ["column", "row", "element"])
@pytest.mark.parametrize(
    ("ratio", "floor", "ceiling"), [(0.5, 0, 1), (0.5, 0.3, 0.7), (0.1, 0.1, 0.9), (1, 0, 1), (0, 0, 1)]
)
def test_layerwise_spends_the_budget_within_bounds(granularity, ratio, floor, ceiling):
    members = {n: m for n, m in matrices(layers=6).items() if m.scored}
    rng = np.random.default_rng(2)
    means = {n: float(np.exp(rng.normal(scale=1.5))) for n in members}
    counts = layerwise_counts(members, granularity, ratio, means, floor, ceiling)
    spent, total = 0, sum(m.elements for m in members.values())
    sizes = []
    for name, m in members.items():
        units = {"column": m.shape[1], "row": m.shape[0], "element": m.elements}[granularity]
        assert math.floor(floor * units) <= counts[name] <= ceiling * units
        sizes.append(m.elements // units)
        spent += counts[name] * sizes[-1]
    slack = max(sizes) if floor < ratio < ceiling else sum(sizes)
    assert abs(spent - ratio * total) <= slack


def test_layerwise_gives_more_to_the_more_important(scores):
    for name, m in scores.matrices.items():
        if m.scored and m.layer == 1:
            scores.tensors[f"wanda/column/{name}"] = scores.tensors[f"wanda/column/{name.replace('s.1.', 's.0.')}"] * 3
    shield = plan(scores, budget="layerwise", ratio=0.4, floor=0.1, ceiling=0.9)
    for name, m in shield.matrices.items():
        if m.layer == 1:
            low, high = shield.ratio_of(name.replace("s.1.", "s.0.")), shield.ratio_of(name)
            assert low < high and high == pytest.approx(3 * low, abs=3 / m.shape[1])
    assert shield.realised()["linear"]["ratio"] == pytest.approx(0.4, abs=0.01)
    assert shield.plan["floor"] == 0.1 and shield.plan["ceiling"] == 0.9


def test_layerwise_with_zero_scores_still_spends_the_budget(scores):
    for name, m in scores.matrices.items():
        if m.scored and m.layer == 1:
            scores.tensors[f"wanda/column/{name}"][:] = 0
    assert plan(scores, budget="layerwise", ratio=0.75).realised()["linear"]["ratio"] == pytest.approx(0.75, abs=0.01)


def test_selectors(scores):
    names = scores.matrices
    assert select(names, "embeddings") == ["model.embed_tokens.weight"]
    assert select(names, "head") == ["lm_head.weight"]
    assert len(select(names, "norms")) == 3 and len(select(names, "attention")) == 8 and len(select(names, "mlp")) == 6
    assert len(select(names, "layers:1")) == 8 and len(select(names, "layers:0-1")) == 16
    assert select(names, "*.0.*up_proj*") == [UP0]
    tied = {n: m for n, m in names.items() if m.kind != "head"}
    with pytest.raises(UserError, match="'head' fits no weight"):
        select(tied, "head")


def test_protection_a_later_rule_wins_and_is_outside_the_budget(scores):
    rules = [
        ProtectRule("layers:0-0", "frozen"),
        ProtectRule("*.0.self_attn.*", "trainable"),
        ProtectRule("embeddings", "frozen"),
        ProtectRule("lm_head.weight", "trainable"),
    ]
    rows = {n: ((36, 20), [0, 2]) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    for budget in ("uniform", "layerwise"):
        options = PlanOptions(budget=budget, protect=rules)
        shield = plan_shield(scores, options, method="ssu", frozen_rows=rows)
        for name, m in shield.matrices.items():
            if m.layer == 0:
                assert shield.ratio_of(name) == (0.0 if "self_attn" in name else 1.0), name
        rest = [m for m in shield.matrices.values() if m.layer == 1 and m.scored]
        frozen = sum(shield.counts[m.name] for m in rest)
        assert frozen / sum(m.elements for m in rest) == pytest.approx(0.5, abs=0.01)
        assert shield.ratio_of("model.embed_tokens.weight") == 1.0
        assert "lm_head.weight" not in shield.masks
        assert shield.masks["model.layers.0.input_layernorm.weight"].elements().all()
        assert sum(m.packed.nbytes for m in shield.masks.values()) < 200  # never a bit an element for whole matrices


def test_special_token_rows(scores):
    rows = {"model.embed_tokens.weight": ((36, 20), [35, 0]), "lm_head.weight": ((36, 20), [35, 0])}
    shield = plan_shield(scores, PlanOptions(), method="ssu", frozen_rows=rows)
    for name in rows:
        assert shield.masks[name].rows().nonzero()[0].tolist() == [0, 35]
    assert shield.realised()["linear"]["ratio"] == 0.5
    with pytest.raises(UserError, match=r"row 36 is outside model\.embed_tokens\.weight"):
        plan_shield(scores, PlanOptions(), method="ssu", frozen_rows={"model.embed_tokens.weight": ((36, 20), [36])})


def test_half_norms(scores, weights, caplog):
    norms = [n for n, m in scores.matrices.items() if m.kind == "norm"]
    shield = plan(scores, weights, norms="half")
    assert shield.plan["norm_importance"] == "none" and "by |w| alone" in caplog.text
    for name in norms:
        np.testing.assert_array_equal(shield.masks[name].elements(), top(weights[name].float().abs().numpy(), 10))
    for name in norms:
        scores.tensors[f"input_norm/column/{name}"] = np.linspace(1, 3, 20)
    shield = plan(scores, weights, norms="half")
    assert shield.plan["norm_importance"] == "input_norm"
    for name in norms:
        values = weights[name].double().abs().numpy() * (1 + (np.linspace(1, 3, 20) / 3) ** 2)
        np.testing.assert_array_equal(shield.masks[name].elements(), top(values, 10))
    with pytest.raises(
        UserError, match=r"half-released: the scores file has input_mean_square of no norm; score again"
    ):
        plan(scores, weights, norms="half-released")
    for name in norms:
        scores.tensors[f"input_mean_square/column/{name}"] = np.linspace(1, 3, 20)
    shield = plan(scores, weights, norms="half-released")
    assert shield.plan["norm_importance"] == "input_mean_square"
    for name in norms:
        values = weights[name].double().abs().numpy() * (1 + np.linspace(1, 3, 20))
        np.testing.assert_array_equal(shield.masks[name].elements(), top(values, 10))
    del scores.tensors[f"input_norm/column/{norms[1]}"]
    with pytest.raises(UserError, match=f"not of {norms[1]}"):
        plan(scores, weights, norms="half")


@pytest.fixture
def deep():
    """Scores of a model with eleven layers, whose names do not sort as their numbers do; its weights and those before."""
    members = matrices(layers=11)
    weights, before = weights_of(members), weights_of(members, seed=1)
    scores = scores_of(members, weights)
    further_scores(scores, weights, before)
    return scores


def value_of(scores: Scores, score: str, name: str) -> float:
    if score in ("snr", "change"):
        return scores.tensors[f"{score}/matrix/{name}"][0]
    return scores.tensors[f"{score}/column/{name}"].sum() / scores.matrices[name].elements


@pytest.mark.parametrize("score", ["snr", "change", "wanda", "fisher", "target-contrast"])
@pytest.mark.parametrize("freeze", ["highest", "lowest"])
def test_by_matrix_each_kind_freezes_its_own(deep, score, freeze):
    shield = plan(deep, score=score, granularity="matrix", ratio=0.4, freeze=freeze)
    assert shield.granularity == "matrix" and shield.budget == "uniform"
    for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        members = sorted((m for m in shield.matrices.values() if m.kind == kind), key=lambda m: m.layer)
        ranked = sorted(members, key=lambda m: value_of(deep, score, m.name), reverse=freeze == "highest")
        frozen = {m.name for m in members if shield.masks[m.name].frozen_units}
        assert frozen == {m.name for m in ranked[:4]}  # floor(0.4 * 11)
    for mask in shield.masks.values():
        assert mask.granularity == "column" and mask.frozen_units in (0, mask.units)


def test_by_matrix_of_equal_scores_the_first_layers_are_frozen(deep):
    for key in deep.tensors:
        deep.tensors[key] = np.ones_like(deep.tensors[key])
    for granularity in ("matrix", "layer"):
        shield = plan(deep, score="snr", granularity=granularity)
        assert {m.layer for n, m in shield.matrices.items() if shield.masks[n].frozen_units} == {0, 1, 2, 3, 4}


def test_per_kind_by_matrix(deep):
    kinds = {"attention": 0.2, "k_proj": 1.0, "mlp": 0.0}
    shield = plan(deep, score="change", granularity="matrix", budget="per-kind", kinds=kinds, ratio=0.3)
    for kind, count in (("q_proj", 2), ("k_proj", 11), ("o_proj", 2), ("up_proj", 0)):
        members = [n for n, m in shield.matrices.items() if m.kind == kind]
        assert sum(shield.masks[n].frozen_units > 0 for n in members) == count


@pytest.mark.parametrize("norms", ["trainable", "frozen"])
@pytest.mark.parametrize("freeze", ["highest", "lowest"])
def test_by_layer_whole_layers_are_frozen(deep, freeze, norms):
    for name, m in deep.matrices.items():  # one kind's scale must not decide alone
        if m.kind == "v_proj":
            deep.tensors[f"change/matrix/{name}"] *= 1e6
    shield = plan(deep, score="change", granularity="layer", ratio=0.3, freeze=freeze, norms=norms)
    members = [m for m in deep.matrices.values() if m.scored]
    average = {
        k: np.mean([value_of(deep, "change", m.name) for m in members if m.kind == k])
        for k in {m.kind for m in members}
    }
    values = {
        layer: np.mean([value_of(deep, "change", m.name) / average[m.kind] for m in members if m.layer == layer])
        for layer in range(11)
    }
    chosen = sorted(values, key=values.__getitem__, reverse=freeze == "highest")[:3]
    for name, m in deep.matrices.items():
        if m.layer is not None and (m.scored or m.layer in chosen):
            assert shield.ratio_of(name) == (m.layer in chosen), name
    norm_masks = {n for n in shield.masks if shield.matrices[n].kind == "norm"}
    assert len(norm_masks) == (3 if norms == "trainable" else 12)
    assert shield.plan["norms"] == norms
    assert sum(m.packed.nbytes for m in shield.masks.values()) < 400


def test_protected_matrices_are_outside_the_ranking_of_matrices_and_layers(deep):
    rules = [
        ProtectRule("layers:0-1", "trainable"),
        ProtectRule("layers:10", "frozen"),
        ProtectRule("norms", "trainable"),
    ]
    by_layer = plan(deep, score="change", granularity="layer", ratio=0.5, protect=rules)
    frozen = {m.layer for n, m in by_layer.matrices.items() if by_layer.masks[n].frozen_units}
    assert len(frozen) == 5 and 10 in frozen and not frozen & {0, 1}  # floor(0.5 * 8), and layer 10
    assert not any(m.kind == "norm" for m in by_layer.matrices.values())
    by_matrix = plan(deep, score="snr", granularity="matrix", ratio=0.5, protect=rules)
    for kind in ("q_proj", "down_proj"):
        assert sum(by_matrix.counts[n] > 0 for n, m in by_matrix.matrices.items() if m.kind == kind) == 5


def test_lowest_is_the_other_end_and_stands_in_the_header_alone_where_it_is_chosen(scores):
    for granularity in ("column", "row"):
        low = plan(scores, granularity=granularity, ratio=0.3, freeze="lowest")
        high = plan(scores, granularity=granularity, ratio=0.7)
        assert low.plan["freeze"] == "lowest" and "freeze" not in high.plan
        for name, mask in low.masks.items():
            count = math.floor(0.3 * mask.units)
            values = scores.get("wanda", granularity, name)
            np.testing.assert_array_equal(mask.bits(), top(values.max() + 1 - values, count))


def test_the_header_names_what_else_scores_were_made_of(deep):
    assert plan(deep, score="change", granularity="matrix").plan["change_from"] == "ef" * 32
    assert plan(deep, score="target-contrast").plan["target_calibration"] == "d" * 64
    deep.settings = {}
    with pytest.raises(UserError, match="the header lacks change_from; make the scores again"):
        plan(deep, score="change")


def test_options_that_decide_nothing_change_no_byte(scores):
    assert plan(scores, seed=1).digest() == plan(scores, seed=2, floor=0.1).digest()


def test_shape_mismatch_of_weights_is_told(scores, weights):
    with pytest.raises(UserError, match="the weight is"):
        plan(scores, {n: w[:-1] for n, w in weights.items()}, granularity="element")


_BIG = """
import resource, sys
import numpy as np
from megatron_ssu.scoring.scores_file import Scores
from megatron_ssu.shield.plan import PlanOptions, plan_shield
from tests.unit.samples import matrices
if sys.argv[1] == "make":
    members = matrices(40, 5120, 5120, 13824, 100352)
    rng = np.random.default_rng(0)
    tensors = {f"wanda/column/{n}": rng.exponential(size=m.shape[1]) for n, m in members.items() if m.scored}
    Scores("13b", "ab" * 32, members, tensors, ["wanda"]).save(sys.argv[2])
else:
    plan_shield(Scores.load(sys.argv[2]), PlanOptions(budget=sys.argv[3]), method="ssu").save(sys.argv[4])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.process
def test_a_13b_shaped_file_is_planned_within_a_gibibyte(tmp_path):
    subprocess.run([sys.executable, "-c", _BIG, "make", str(tmp_path / "scores")], check=True)
    for budget in ("uniform", "layerwise"):
        command = [sys.executable, "-c", _BIG, "plan", str(tmp_path / "scores"), budget, str(tmp_path / budget)]
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        unit = 1 if sys.platform == "darwin" else 1024
        assert peak * unit < 2**30
        assert (tmp_path / budget).stat().st_size < 2**20


def random_shield(scores: Scores, seed: int, granularity: str = "column", **changes) -> Shield:
    shield = plan(scores, score="random", granularity=granularity, ratio=0.1 + 0.2 * seed, seed=seed)
    return replace(shield, **changes)


@pytest.mark.parametrize("kinds", [("column",) * 3, ("row",) * 3, ("element",) * 3, ("column", "row", "element")])
@pytest.mark.parametrize("operation", ["union", "intersection", "difference"])
def test_composition_is_set_algebra(scores, kinds, operation, tmp_path):
    shields = [random_shield(scores, i + 1, kind) for i, kind in enumerate(kinds)]
    loaded = []
    for i, shield in enumerate(shields):
        shield.save(tmp_path / str(i))
        loaded.append(load_shield(tmp_path / str(i)))
    made = compose(operation, loaded)
    for name, mask in made.masks.items():
        a, b, c = (s.masks[name].full() for s in shields)
        want = {"union": a | b | c, "intersection": a & b & c, "difference": a & ~b & ~c}[operation]
        np.testing.assert_array_equal(mask.full(), want)
        assert mask.granularity == (kinds[0] if len(set(kinds)) == 1 else "element")
        assert made.counts[name] == want.sum()
    assert made.made == compose(operation, shields).made
    assert made.made["operation"] == operation and [p["ratio"] for p in made.made["of"]] == [s.ratio for s in shields]
    made.save(tmp_path / "made")
    assert compose(operation, shields).digest() == made.digest()


def test_composition_with_a_matrix_in_one_shield_alone(scores):
    with_norms = plan(scores, norms="frozen")
    without = plan(scores)
    norm = "model.norm.weight"
    assert compose("union", [without, with_norms]).masks[norm].elements().all()
    assert not compose("intersection", [without, with_norms]).masks[norm].elements().any()
    assert not compose("difference", [without, with_norms]).masks[norm].elements().any()
    assert compose("difference", [with_norms, without]).masks[norm].elements().all()


def test_composition_refuses(scores):
    one = plan(scores)
    with pytest.raises(UserError, match=r"made for model other .* not for tiny"):
        compose("union", [one, replace(one, model="other", fingerprint="00" * 32)])
    with pytest.raises(UserError, match="'xor' is unknown; choose one of union"):
        compose("xor", [one, one])
    with pytest.raises(UserError, match="needs two shield files"):
        compose("union", [one])


def test_memory_of_masks_is_bits(scores):
    big = {n: m for n, m in matrices(1, 512, 256, 1024).items() if m.scored}
    empty = Scores("tiny", "ab" * 32, big, {}, [])
    for granularity, expected in (("column", 6 * 64 + 128), ("row", 2 * 64 + 2 * 32 + 2 * 128 + 64)):
        shield = plan(empty, score="random", granularity=granularity)
        assert sum(m.packed.nbytes for m in shield.masks.values()) == expected
    shield = plan(empty, score="random", granularity="element")
    assert sum(m.packed.nbytes for m in shield.masks.values()) == sum(m.elements for m in big.values()) // 8


def test_matrix_knows_its_size():
    assert Matrix("a", (3, 4), 0, "q_proj").elements == 12 and Matrix("a", (3,), None, "norm").elements == 3
