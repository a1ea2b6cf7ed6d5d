"""Scores against a few lines of plain transformers, and what bad weights and data make of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.dist import score_work
from tests.dist.ranks import RankError
from tests.dist.work import mesh
from tests.models import make_model

MESHES = {
    "TP1": (1, mesh()),
    "TP2xPP2xDP2": (8, mesh(2, 2)),
    "TP2": (2, mesh(2)),
    "PP2": (2, mesh(1, 2)),
    "DP2": (2, mesh()),
    "TP2+SP": (2, mesh(2, sequence=True)),
}
FEW = {name: MESHES[name] for name in ("TP1", "TP2xPP2xDP2", "TP2+SP")}


def target_norms(model, data):
    """{matrix: ||X_j||_2 over all real tokens} by forward hooks on transformers' model."""
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    found, mask = {}, None

    def hook(name):
        def look(module, args):
            found[name] = found.get(name, 0.0) + args[0][0, mask].double().square().sum(0)

        return look

    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(name + ".weight"))
    with torch.no_grad():
        for ids, mask in zip(data.tokens, data.mask, strict=True):  # noqa: B007 - the hooks read it
            net(ids[None])
    return {name: squares.sqrt() for name, squares in found.items()}


def ratio_of_means(source, target):
    source, target = source / source.mean(), target / target.mean()
    return (source + 0.01) / (target + 0.01)


def signal_to_noise(weight):
    """As Spectrum defines it, in numpy."""
    singular = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    sigma = (np.percentile(singular, 75) - np.percentile(singular, 25)) / 1.349
    above = singular > sigma * (1 + np.sqrt(min(weight.shape) / max(weight.shape)))
    return singular[above].sum() / (singular[~above].sum() or 1) / singular.max()


def expected_change(model, before):
    """{change/axis/matrix: float64} of two safetensors files."""
    old, found = load_file(before / "model.safetensors"), {}
    for key, weight in load_file(model / "model.safetensors").items():
        if "_proj" in key:
            moved = (weight.double() - old[key].double()).abs()
            found[f"change/column/{key}"] = moved.norm(dim=0)
            found[f"change/row/{key}"] = moved.norm(dim=1)
            found[f"change/matrix/{key}"] = (moved.norm() / old[key].double().norm()).reshape(1)
    return {key: value.numpy() for key, value in found.items()}


def expected_scores(model, data):
    """{score/axis/matrix: float64} by forward hooks and autograd on transformers' model, and the norms' statistics."""
    import transformers

    on_target = target_norms(model, score_work.target())

    net = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    modules = {n: m for n, m in net.named_modules() if hasattr(m, "weight") and "layers." in n}
    linear = {n: m for n, m in modules.items() if isinstance(m, torch.nn.Linear)}
    sums = {n: [0.0, 0.0] for n in modules}
    fisher = dict.fromkeys(linear, 0.0)
    mask = None

    def hook(name):
        def look(module, args):
            squares = args[0][0, mask].double().square().sum(0).flatten()
            sums[name][0] += squares
            sums[name][1] += squares / mask.sum()

        return look

    for name, module in modules.items():
        module.register_forward_pre_hook(hook(name))
    rows = len(data.tokens)
    for ids, mask in zip(data.tokens, data.mask, strict=True):
        logits = net(ids[None]).logits[0, :-1]
        real = mask[1:] & mask[:-1]
        loss = torch.nn.functional.cross_entropy(logits[real], ids[1:][real])
        net.zero_grad()
        loss.backward()
        for name, module in linear.items():
            fisher[name] = fisher[name] + module.weight.grad.double().square() / rows
    found = {}
    for name, module in modules.items():
        key = name + ".weight"
        norm, mean = sums[name][0].sqrt(), sums[name][1] / rows
        if name not in linear:
            found[f"input_norm/column/{key}"] = norm
            found[f"input_mean_square/column/{key}"] = mean
            continue
        w = module.weight.detach().double().abs()
        found |= {
            f"wanda/column/{key}": (w * norm).sum(0),
            f"wanda/row/{key}": (w * norm).sum(1),
            f"wanda-released/column/{key}": w.norm(dim=0) * mean,
            f"wanda-released/row/{key}": w.norm(dim=1),
            f"target-contrast/column/{key}": ratio_of_means((w * norm).sum(0), (w * on_target[key]).sum(0)),
            f"target-contrast/row/{key}": ratio_of_means((w * norm).sum(1), (w * on_target[key]).sum(1)),
            f"target_input_norm/column/{key}": on_target[key],
            f"magnitude-released/column/{key}": w.norm(dim=0),
            f"magnitude-released/row/{key}": w.norm(dim=1),
            f"snr/matrix/{key}": torch.tensor([signal_to_noise(module.weight.detach())]),
            f"sparsegpt-diagonal-released/column/{key}": mean,
            f"sparsegpt-diagonal-released/row/{key}": (w * mean).sum(1),
            f"magnitude/column/{key}": w.sum(0),
            f"magnitude/row/{key}": w.sum(1),
            f"sparsegpt-diagonal/column/{key}": mean,
            f"sparsegpt-diagonal/row/{key}": mean.sum().expand(len(w)),
            f"fisher/column/{key}": fisher[name].sum(0),
            f"fisher/row/{key}": fisher[name].sum(1),
            f"input_norm/column/{key}": norm,
            f"input_mean_square/column/{key}": mean,
        }
    return {key: value.detach().numpy() for key, value in found.items()}


@pytest.mark.parametrize("kind", ["olmo2", "llama"])
def test_scores_equal_transformers_with_hooks(kind, ranks, tmp_path):
    model, before = make_model(kind, tmp_path / "model"), make_model(kind, tmp_path / "before", seed=1)
    data = score_work.tokens()
    expected = expected_scores(model, data) | expected_change(model, before)
    for name, (world, parallel) in (MESHES if kind == "olmo2" else FEW).items():
        options = {"data": data, "norms": "half-released", "before": str(before)}
        made = ranks.run(score_work.scores, world, str(model), parallel, **options)[0]
        norms = {m for m in made.matrices.values() if m.kind == "norm"}
        assert len(made.matrices) == len(load_file(model / "model.safetensors"))
        assert all(made.has("input_norm", "column", m.name) for m in norms)
        assert not any(":" in key for key in made.tensors) and made.tensors.keys() >= expected.keys()
        assert made.settings["change_from"]["model"] == "before"
        assert made.settings["target_calibration"] == {"digest": "digest", "samples": 3, "tokens": 34}
        assert made.tokens == int(data.mask.sum())
        for key, value in expected.items():
            assert made.tensors[key].shape == value.shape
            assert np.allclose(made.tensors[key], value, rtol=1e-5, atol=0), (name, key)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputed_layers_are_counted_once(recompute, ranks, tmp_path):
    model = make_model("olmo2", tmp_path / "model")
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    selective = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
    options = {"full": full, "selective": selective}[recompute]
    plain = ranks.run(score_work.scores, 1, str(model), mesh())[0]
    for world, parallel in ((2, mesh(1, 2)), (2, mesh(2, sequence=True))):
        made = ranks.run(score_work.scores, world, str(model), parallel, transformer=options)[0]
        for key, value in plain.tensors.items():
            assert np.allclose(made.tensors[key], value, rtol=1e-5, atol=0), key


def test_rows_that_do_not_divide_over_sequence_parallel_ranks(ranks, tmp_path):
    model, data = make_model("llama", tmp_path / "model"), score_work.tokens(length=15)
    plain = ranks.run(score_work.scores, 1, str(model), mesh(), data=data)[0]
    made = ranks.run(score_work.scores, 4, str(model), mesh(4, sequence=True), data=data)[0]
    for key, value in plain.tensors.items():
        assert np.allclose(made.tensors[key], value, rtol=1e-5, atol=0), key


def test_more_ranks_than_rows(ranks, tmp_path):
    model, data = make_model("llama", tmp_path / "model"), score_work.tokens(rows=1)
    plain = ranks.run(score_work.scores, 1, str(model), mesh(), data=data)[0]
    made = ranks.run(score_work.scores, 4, str(model), mesh(1, 2, 2), data=data)[0]
    for key, value in plain.tensors.items():
        assert np.allclose(made.tensors[key], value, rtol=1e-5, atol=0), key


def test_fisher_holds_no_more_than_its_sums_and_one_matrix(ranks, tmp_path):
    model = make_model("llama", tmp_path / "model", hidden_size=128, intermediate_size=512)
    peak = ranks.run(score_work.fisher_peak, 1, str(model), 8)[0]
    matrix, column_sums = 512 * 128 * 4, 512 * 4
    assert 0 < peak["with"] - peak["without"] <= matrix + column_sums


def _broken(model, target, tensor, value):
    target.mkdir()
    for file in model.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(model / "model.safetensors")
    weights[tensor][3] = value
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("tensor", "value", "told"),
    [
        ("model.layers.2.mlp.up_proj.weight", float("nan"), "model.layers.2.mlp.up_proj.weight: holds NaN or infinite"),
        ("model.layers.1.input_layernorm.weight", float("inf"), "model.layers.1.input_layernorm.weight: holds NaN"),
        (
            "model.layers.1.mlp.up_proj.weight",
            3e38,
            "the input of model.layers.1.mlp.down_proj.weight holds NaN or inf",
        ),
    ],
    ids=["nan", "infinite", "overflow"],
)
def test_bad_numbers_name_the_layer(tensor, value, told, ranks, tmp_path):
    model = make_model("llama", tmp_path / "model")
    broken = _broken(model, tmp_path / "broken", tensor, value)
    for world, parallel in ((1, mesh()), (4, mesh(2, 2))):
        for names in (["wanda"], ["wanda", "fisher"]):
            with pytest.raises(RankError) as caught:
                ranks.run(score_work.scores, world, str(broken), parallel, names=names)
            assert caught.value.kind == "UserError"
            assert told in caught.value.message and "\n" not in caught.value.message


def test_a_score_without_calibration_is_refused(ranks, tmp_path):
    model = make_model("llama", tmp_path / "model")
    with pytest.raises(RankError) as caught:
        ranks.run(score_work.without_data, 2, str(model), mesh(2), ["wanda"])
    assert caught.value.kind == "UserError" and "shield.calibration.path" in caught.value.message
    made = ranks.run(score_work.without_data, 2, str(model), mesh(2), ["magnitude"])[0]
    assert made.calibration == "none" and made.available() == ["magnitude/column", "magnitude/row"]
    assert made.settings == {}
    with pytest.raises(RankError) as caught:
        ranks.run(score_work.without_data, 2, str(model), mesh(2), ["wander"])
    assert "choose from" in caught.value.message


def test_a_broken_checkpoint_to_compare_with_is_refused_on_all_ranks(ranks, tmp_path):
    model = make_model("llama", tmp_path / "model")
    name = "model.layers.2.mlp.up_proj.weight"
    broken = _broken(model, tmp_path / "broken", name, float("nan"))
    for world, parallel in ((1, mesh()), (4, mesh(2, 2))):
        with pytest.raises(RankError) as caught:
            ranks.run(score_work.scores, world, str(model), parallel, names=["magnitude"], before=str(broken))
        assert caught.value.kind == "UserError" and caught.value.agreed == (world > 1)
        assert caught.value.message.startswith(f"{broken}: {name}: holds NaN or infinite weights")


def test_fewer_samples_than_asked_is_told(tmp_path):
    from megatron_ssu.data.calibration import load_calibration
    from megatron_ssu.data.tokenizer import load_tokenizer
    from tests.unit.data_makers import make_hf_tokenizer

    make_hf_tokenizer(tmp_path / "model")
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"text": f"sample {i}"}) + "\n" for i in range(3)))
    data = load_calibration(file, load_tokenizer(tmp_path / "model"), samples=7, sequence_length=8, seed=1)
    assert "3 calibration samples there, 7 asked for" in data.note
