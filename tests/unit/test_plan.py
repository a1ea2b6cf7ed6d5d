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
from megatron_ssu.shield.plan import TIE, PlanOptions, ProtectRule, freeze_top, plan_shield, select
from megatron_ssu.shield.shield_file import Shield, load_shield
from tests.unit.samples import matrices, scores_of, weights_of

UP0 = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return weights_of(matrices())


@pytest.fixture
def scores(weights) -> Scores:
    return scores_of(matrices(), weights)


def plan(scores: Scores, weights=None, **options) -> Shield:
    lookup = None if weights is None else weights.__getitem__
    return plan_shield(scores, PlanOptions(**options), method="ssu", weights=lookup)


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


@pytest.mark.parametrize("score", ["wanda", "wanda-released", "magnitude", "sparsegpt-diagonal", "fisher"])
def test_element_scores(scores, weights, score):
    shield = plan(scores, weights, score=score, granularity="element", ratio=0.3)
    for name, mask in shield.masks.items():
        weight = weights[name].double().abs().numpy()
        tensors = {k.rsplit("/", 1)[0]: v for k, v in scores.tensors.items() if k.endswith(name)}
        expected = {
            "wanda": weight * tensors["input_norm/column"],
            "wanda-released": weight * tensors["input_mean_square/column"],
            "magnitude": weight,
            "sparsegpt-diagonal": np.ones_like(weight) * tensors["sparsegpt-diagonal/column"],
            "fisher": np.outer(tensors["fisher/row"], tensors["fisher/column"]),
        }[score]
        count = math.floor(0.3 * weight.size)
        got, want = mask.elements().reshape(-1), top(expected, count)
        assert got.sum() == count
        if score in ("magnitude", "sparsegpt-diagonal"):
            np.testing.assert_array_equal(got, want)  # exact in float32
        else:
            assert (got != want).sum() <= 2, name  # float32 products may order two near ties otherwise


def test_released_element_scores_add_up_to_its_column_score(scores, weights):
    """Its column score is the L2 norm over rows of its element score."""
    norm = np.sqrt(((weights[UP0].double().numpy() * scores.column("input_mean_square", UP0)) ** 2).sum(0))
    np.testing.assert_allclose(norm, scores.column("wanda-released", UP0), rtol=1e-12)


def test_random_needs_nothing_but_names_and_seed(scores):
    empty = replace(scores, tensors={}, scores=[])
    for granularity in ("column", "row", "element"):
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


def test_freeze_top_equals_sorting():
    rng = np.random.default_rng(1)
    for size in (1, 2, 17, 200):
        values = rng.integers(0, 6, size).astype(np.float64) * 0.37
        for count in {0, 1, size // 3, size // 2, size - 1, size}:
            np.testing.assert_array_equal(freeze_top(values, count), top(values, count))


def test_values_within_the_tolerance_of_the_cut_are_one_tie():
    values = np.array(
        [1.0, 2.0 * (1 - TIE / 2), 3.0, 2.0, 2.0 * (1 + TIE / 2), 2.0 * (1 + 3 * TIE), 2.0 * (1 - 3 * TIE)]
    )
    assert freeze_top(values, 4).tolist() == [False, True, True, True, False, True, False]
    assert freeze_top(values, 5).tolist() == [False, True, True, True, True, True, False]


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
        ({"score": "hessian"}, "no hessian by column for .*; it has"),
        ({"score": "sparsegpt-diagonal", "granularity": "row"}, "no sparsegpt-diagonal by row"),
        ({"granularity": "element"}, "element needs the weights"),
        ({"granularity": "element", "score": "hessian"}, "'hessian' has no element scores; choose one of wanda"),
        ({"norms": "half"}, "half needs the norms' weights"),
        ({"kinds": {"mlp": 0.1}}, "has a meaning with shield.budget per-kind alone"),
        ({"budget": "per-kind", "kinds": {"mpl": 0.1}}, "shield.kinds.mpl: no such kind .* attention, mlp, down_proj"),
        ({"budget": "per-kind", "kinds": {"mlp": 1.1}}, "shield.kinds.mlp: 1.1 is no share"),
        ({"budget": "layerwise", "floor": 0.6}, "0.5 does not lie between shield.floor 0.6 and shield.ceiling 1.0"),
        ({"budget": "layerwise", "ceiling": 0.4}, "does not lie between"),
        ({"protect": [ProtectRule("embeddings", "half")]}, "must be frozen or trainable"),
        ({"protect": [ProtectRule("*.qkv.weight", "frozen")]}, r"'\*.qkv.weight' fits no weight"),
        ({"protect": [ProtectRule("layers:1-2", "frozen")]}, "outside layers 0-1"),
        ({"protect": [ProtectRule("layers:x", "frozen")]}, "no range of layers"),
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
    del scores.tensors[f"input_norm/column/{norms[1]}"]
    with pytest.raises(UserError, match=f"not of {norms[1]}"):
        plan(scores, weights, norms="half")


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
