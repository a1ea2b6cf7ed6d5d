"""Every model family against transformers: logits, gradients and training under a shield on meshes, the bits of an export, and
that each of a family's own features counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_ssu.shield.verify import verify
from tests.dist import family_work, packing_work, score_work, work
from tests.dist.test_models import MESHES
from tests.dist.test_shield_mesh import check_scores
from tests.dist.test_shielded_training import oracle, random_shield
from tests.dist.work import mesh
from tests.models import FAMILIES, by_file, make_model

ALL = pytest.mark.slow
SHARED_HEADS = {"num_key_value_heads": 2}  # fewer than the ranks of TP4
TOLERANCE = 2e-4

DAMAGES = {
    "qwen2": ["no biases"],
    "qwen2-window": ["window one wider", "window one narrower", "no biases"],
    "qwen3": ["no q and k norms"],
    "mistral": ["window one wider", "window one narrower"],
    "smollm3": ["positions where there are none and none where there are"],
    "olmo3": [
        "window one wider",
        "window one narrower",
        "rope of the first kind in all layers",
        "attention scale of the head",
        "no q and k norms",
    ],
    "phi3": ["window one wider"],
    "phi3-longrope": ["all channels turned alike"],
    "gemma2": [
        "window one narrower",
        "no attention cap",
        "no logit cap",
        "no embedding scale",
        "attention scale of the head",
        "norms that are not centred",
    ],
    "gemma3": [
        "window one narrower",
        "rope of the first kind in all layers",
        "no embedding scale",
        "attention scale of the head",
        "no q and k norms",
    ],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> directory, made once; with `shared`, with fewer key/value heads."""
    folder, made = tmp_path_factory.mktemp("families"), {}

    def model(name, shared=False):
        if (name, shared) not in made:
            made[name, shared] = make_model(name, folder / f"{name}{shared}", **(SHARED_HEADS if shared else {}))
        return made[name, shared]

    return model


def ids_of(length):
    return torch.randint(0, work.VOCAB, (2, length), generator=torch.Generator().manual_seed(1))


def transformers_logits(model, ids):
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return reference(ids).logits


def check_logits(ranks, model, meshes, length=48):
    ids = ids_of(length)
    expected = transformers_logits(model, ids)
    assert expected.std() > 0.1
    for label, (world, parallel) in meshes.items():
        found = next(x for x in ranks.run(work.logits, world, str(model), parallel, ids) if x is not None)
        assert (found - expected).abs().max() < TOLERANCE, label


@pytest.mark.parametrize("meshes", [("TP2xPP2+SP",), pytest.param(tuple(MESHES), marks=ALL)], ids=["few", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name, meshes, models, ranks):
    check_logits(ranks, models(name), {label: MESHES[label] for label in meshes})


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_more_tensor_parallel_ranks_than_key_value_heads(name, models, ranks):
    check_logits(ranks, models(name, shared=True), {k: MESHES[k] for k in ("TP2", "TP4", "TP4+SP")})


def test_longrope_takes_its_short_table_for_short_rows(models, ranks):
    check_logits(ranks, models("phi3-longrope"), {"TP1": (1, mesh())}, length=24)


def test_layers_of_one_type_alone_have_their_own_rope(ranks, tmp_path):
    """Olmo-3's first layers all have windows."""
    model = make_model("olmo3", tmp_path / "model", num_hidden_layers=2, layer_types=["sliding_attention"] * 2)
    check_logits(ranks, model, {"TP1": (1, mesh())})


@pytest.mark.parametrize("name", DAMAGES)
def test_each_feature_counts(name, models, ranks):
    check_damages(ranks, models(name), DAMAGES[name])


def check_damages(ranks, model, damages):
    """A model that is built wrong in one place gives other logits than transformers."""
    ids = ids_of(48)
    expected = transformers_logits(model, ids)
    (found,) = ranks.run(family_work.damaged_logits, 1, str(model), damages, ids)
    assert (found[0] - expected).abs().max() < TOLERANCE
    for damage, logits in zip(damages, found[1:], strict=True):
        assert (logits - expected).abs().max() > 5 * TOLERANCE, damage


@pytest.mark.parametrize(
    "name", [n if n in ("phi3", "gemma3", "qwen2") else pytest.param(n, marks=ALL) for n in FAMILIES]
)
def test_import_then_export_gives_every_bit_back(name, ranks, tmp_path):
    check_bits(ranks, name, tmp_path, {label: MESHES[label] for label in ("TP1", "TP2xPP2+SP", "PP2xVPP2")})


def check_bits(ranks, name, folder, meshes):
    import transformers

    model = make_model(name, folder / "model", torch.bfloat16, max_shard_size="150KB")
    source = {k: v for file in model.glob("*.safetensors") for k, v in load_file(file).items()}
    for label, (world, parallel) in meshes.items():
        target = folder / label
        ranks.run(work.convert, world, str(model), parallel, "bf16", str(target), 10**9)
        exported = load_file(target / "model.safetensors")
        assert exported.keys() == source.keys()
        assert all(torch.equal(exported[k].view(torch.int16), v.view(torch.int16)) for k, v in source.items()), label
    transformers.AutoModelForCausalLM.from_pretrained(target)


def rows(length=48, count=4):
    """Samples of random tokens, longer than two windows."""
    found = []
    for number in range(count):
        stream = torch.randint(0, work.VOCAB, (length + 1,), generator=torch.Generator().manual_seed(number))
        found.append(
            {
                "tokens": stream[:-1],
                "labels": stream[1:],
                "loss_mask": torch.ones(length),
                "position_ids": torch.arange(length),
            }
        )
    return found


@pytest.mark.parametrize("name", [n if n in ("qwen2", "qwen3") else pytest.param(n, marks=ALL) for n in FAMILIES])
def test_gradients_of_every_parameter_equal_transformers(name, models, ranks, tmp_path):
    check_gradients(ranks, models(name), tmp_path, {label: MESHES[label] for label in ("TP1", "TP2+SP")})


def check_gradients(ranks, model, folder, meshes):
    import transformers

    found = rows()
    net = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    tokens, labels = (torch.stack([row[key] for row in found]) for key in ("tokens", "labels"))
    torch.nn.functional.cross_entropy(net(tokens).logits.flatten(0, 1), labels.flatten()).backward()
    expected = by_file(net.config, {key: param.grad for key, param in net.named_parameters()})
    for label, (world, parallel) in meshes.items():
        options = {"isolated": False}
        ranks.run(packing_work.gradients, world, str(model), parallel, found, 2, str(folder / label), **options)
        own = load_file(folder / label / "model.safetensors")
        assert own.keys() == expected.keys()
        for key, gradient in expected.items():
            assert gradient.abs().max() > 1e-5, key
            where = f"{label} {key}"
            torch.testing.assert_close(
                own[key], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, where=where: f"{where}: {text}"
            )


def check_training(ranks, model, folder, meshes, steps=6):
    """Losses and gradient norms of every mesh against plain torch, and every frozen bit."""
    shield = random_shield(model, folder / "shield.safetensors")
    expected = None
    for label, (world, parallel) in meshes.items():
        target = folder / label
        options = {"shield_file": str(shield), "target": str(target)}
        found = ranks.run(work.train_steps, world, str(model), parallel, steps, **options)[0]["history"]
        expected = expected or oracle(model, shield, [lr for _, _, lr in found])
        for (loss, norm, _), (wanted, wanted_norm) in zip(found, expected, strict=True):
            assert loss == pytest.approx(wanted, abs=1e-5), label
            assert norm == pytest.approx(wanted_norm, rel=1e-4), label
        assert verify(model, target, shield).ok, label
        moved, before = load_file(target / "model.safetensors"), load_file(model / "model.safetensors")
        assert all(not torch.equal(moved[k], v) for k, v in before.items()), label


@pytest.mark.parametrize("name", [n if n in ("qwen2", "olmo3") else pytest.param(n, marks=ALL) for n in FAMILIES])
def test_training_under_a_shield_equals_plain_torch(name, models, ranks, tmp_path):
    check_training(ranks, models(name), tmp_path, {k: MESHES[k] for k in ("TP1", "TP2+SP")})


@pytest.mark.parametrize("name", ["qwen2", pytest.param("qwen3", marks=ALL)])
def test_training_with_more_tensor_parallel_ranks_than_key_value_heads(name, models, ranks, tmp_path):
    check_training(ranks, models(name, shared=True), tmp_path, {k: MESHES[k] for k in ("TP4", "TP4+SP")})


@pytest.mark.parametrize(
    "name", ["qwen2", pytest.param("qwen3", marks=ALL), "mistral", pytest.param("gemma2", marks=ALL)]
)
def test_scores_and_shields_do_not_depend_on_the_mesh(name, ranks, tmp_path):
    model = make_model(name, tmp_path / "model", **SHARED_HEADS)
    biases = "half" if name == "qwen2" else "trainable"
    check_shields(ranks, model, tmp_path, {k: MESHES[k] for k in ("TP1", "TP2+SP", "TP4", "TP2xPP2")}, biases=biases)


def check_shields(ranks, model, folder, meshes, names=score_work.NAMES, of_largest=0, **shield):
    """With one scores file, shields have the same bytes; scores of two meshes are equal within rounding. Returns the scores."""
    first = None
    for label, (world, parallel) in meshes.items():
        scores = ranks.run(score_work.mesh_scores, world, str(model), parallel, names)[0]
        if first is None:
            first = scores
            first.save(folder / "scores.safetensors")
        assert scores.tensors.keys() == first.tensors.keys(), label
        check_scores(scores, first, label, of_largest)
    made = set()
    for label, (world, parallel) in meshes.items():
        target, options = folder / label, {"scores": str(folder / "scores.safetensors"), **shield}
        ranks.run(score_work.planned, world, str(model), parallel, str(target), "fp32", **options)
        made.add((target / "shield.safetensors").read_bytes())
    assert len(made) == 1
    return first


def test_statistics_of_a_norm_by_head_are_over_all_heads(ranks, tmp_path):
    """Against transformers' own q and k, whose squares are averaged over tokens and heads."""
    import transformers

    model = make_model("qwen3", tmp_path / "model")
    scores = ranks.run(score_work.mesh_scores, 2, str(model), mesh(2), ["wanda"])[0]
    net = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    seen = []
    net.model.layers[1].self_attn.q_norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    data = score_work.tokens()
    with torch.no_grad():
        net(data.tokens)
    x = seen[0].double().square()  # [b, s, heads, d]
    name = "model.layers.1.self_attn.q_norm.weight"
    squares = x[data.mask].sum((0, 1)).sqrt()
    means = sum(row[real].mean((0, 1)) for row, real in zip(x, data.mask, strict=True)) / len(x)
    np.testing.assert_allclose(scores.tensors[f"input_norm/column/{name}"], squares, rtol=1e-5)
    np.testing.assert_allclose(scores.tensors[f"input_mean_square/column/{name}"], means, rtol=1e-5)
