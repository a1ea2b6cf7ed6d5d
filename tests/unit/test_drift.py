"""compare and similarity: against numpy and transformers, and what they refuse."""

from __future__ import annotations

import json
import math
import sys
import types

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_ssu.cli import main
from megatron_ssu.drift.similarity import hidden_encoder, read_instructions, sentence_encoder, similarities
from megatron_ssu.drift.weights import compare_weights
from megatron_ssu.errors import UserError
from megatron_ssu.models.source import open_source
from tests.models import make_model
from tests.unit.data_makers import TEMPLATE, TEXTS, make_hf_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base in bf16, and two trainings of it: one moved half of the weights, one in two files."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 321, "dtype": torch.bfloat16}
    base = make_model("olmo2", folder / "base", **sizes)
    found = [base]
    for number in (1, 2):
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        torch.manual_seed(number)
        with torch.no_grad():
            for param in model.parameters():
                moves = torch.rand_like(param.float()) < 0.5
                param.copy_(torch.where(moves, param + 0.05 * torch.randn_like(param), param))
        model.save_pretrained(folder / str(number), max_shard_size="100KB" if number == 2 else "5GB")
        found.append(folder / str(number))
    for path in found:
        make_hf_tokenizer(path, template=TEMPLATE)
    return found


def arrays(path):
    found = {}
    for file in path.glob("*.safetensors"):
        found |= {name: tensor.double().numpy() for name, tensor in load_file(file).items()}
    return found


def test_weights_against_numpy(models):
    drift = compare_weights(*(lambda base, *others: (base, others))(*map(open_source, models)))
    a, b, c = map(arrays, models)
    flat = [np.concatenate([w[name].ravel() for name in sorted(a)]) for w in (a, b, c)]
    for number, other in enumerate(flat[1:]):
        found = drift.models[number].to_dict()
        assert found["difference"] == pytest.approx(np.linalg.norm(other - flat[0]), rel=1e-12)
        assert found["relative"] == pytest.approx(np.linalg.norm(other - flat[0]) / np.linalg.norm(flat[0]), rel=1e-12)
        assert found["moved"] == np.mean(other != flat[0]) and found["largest"] == np.abs(other - flat[0]).max()
        assert found["elements"] == flat[0].size
    names = [n for n in a if "up_proj" in n]
    moved = math.sqrt(sum(np.square(b[n] - a[n]).sum() for n in names) / sum(np.square(a[n]).sum() for n in names))
    assert drift.models[0].to_dict()["kinds"]["up_proj"]["relative"] == pytest.approx(moved, rel=1e-12)
    layer = [n for n in a if ".layers.2." in n]
    moved = math.sqrt(sum(np.square(b[n] - a[n]).sum() for n in layer))
    assert drift.models[0].to_dict()["layers"]["2"]["difference"] == pytest.approx(moved, rel=1e-12)
    updates = [other - flat[0] for other in flat[1:]]
    pair = drift.pairs[0, 1].to_dict(*(model.total for model in drift.models))
    assert pair["difference"] == pytest.approx(np.linalg.norm(updates[0] - updates[1]), rel=1e-12)
    assert pair["relative_to_first_update"] == pytest.approx(pair["difference"] / np.linalg.norm(updates[0]), rel=1e-12)
    cosine = updates[0] @ updates[1] / np.linalg.norm(updates[0]) / np.linalg.norm(updates[1])
    assert pair["cosine_of_updates"] == pytest.approx(cosine, rel=1e-9)


def call(*arguments):
    with pytest.raises(SystemExit) as status:
        main([*map(str, arguments)])
    return status.value.code


def test_the_command_writes_tables_pictures_and_json(models, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    status = call(
        "compare",
        *models,
        "--text",
        text,
        "--sequence-length",
        32,
        "--json",
        tmp_path / "a.json",
        "--output",
        tmp_path / "p",
    )
    output = capsys.readouterr().out
    assert status == 0 and "1 against base" in output and "models with each other" in output and "cosine" in output
    found = json.loads((tmp_path / "a.json").read_text())
    assert [model["path"] for model in found["models"]] == [str(path) for path in models[1:]]
    assert set(found["models"][0]["hidden"]["layers"]) == {"0", "1", "2", "3"} and len(found["pairs"]) == 1
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["hidden.png", "weights.png"]


def damaged(models, tmp_path, change):
    """A copy of the base whose tensors were changed."""
    import shutil

    shutil.copytree(models[0], tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "bad" / "model.safetensors", {"format": "pt"})
    return tmp_path / "bad"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks 1 tensors that the other model has, such as model.norm.weight"),
        (lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:5].clone()}), "model.norm.weight is [5]"),
        (lambda t: t["model.norm.weight"].fill_(math.nan), "model.norm.weight has NaN"),
    ],
)
def test_models_that_cannot_be_compared_are_named(models, tmp_path, capsys, change, words):
    bad = damaged(models, tmp_path, change)
    assert call("compare", models[0], bad, "--json", tmp_path / "a.json") == 2
    error = capsys.readouterr().err
    assert words in error and "bad" in error and error.count("\n") == 1 and not (tmp_path / "a.json").exists()


def test_unlike_and_broken_models_are_named_before_and_after_reading_text(models, tmp_path, capsys):
    """With --text, where models are built first."""
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": TEXTS[0] * 4}) + "\n")
    other = make_model("olmo2", tmp_path / "other", vocab_size=321, num_hidden_layers=3)
    broken = damaged(models, tmp_path, lambda t: t["model.norm.weight"].fill_(math.nan))
    for path in (other, broken):
        make_hf_tokenizer(path, template=TEMPLATE)
    capsys.readouterr()  # progress bars of transformers
    for path, words in ((other, "tensors"), (broken, "bad: its predictions are not finite")):
        assert call("compare", models[0], path, "--text", text, "--sequence-length", 16) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_bad_arguments_of_compare(models, tmp_path, capsys):
    assert call("compare", models[0]) == 2
    assert call("compare", *models, "--samples", 0) == 2
    assert call("compare", *models, "--text", tmp_path / "none.jsonl") == 2
    assert call("compare", models[0], tmp_path) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and "none.jsonl" in lines[2] and "config.json" in lines[3]


# ---- similarity


def chats(path, texts):
    rows = [{"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": t[::-1]}]} for t in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_instructions_are_what_users_say(tmp_path):
    rows = [
        {
            "messages": [
                {"role": r, "content": c}
                for r, c in (("system", "s"), ("user", "a"), ("assistant", "x"), ("user", "b"))
            ]
        },
        {"instruction": "do", "input": "this", "output": "done"},
        {"instruction": "only"},
        {"text": "plain"},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_instructions(file, None, 1) == ["a\nb", "do\n\nthis", "only", "plain"]
    assert len(read_instructions(file, 2, 1)) == 2 and read_instructions(file, 2, 1) == read_instructions(file, 2, 1)


def test_hidden_states_against_transformers_one_by_one(models):
    encode = hidden_encoder(models[0], 4, -1)
    found = encode(TEXTS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(models[0])
    model = transformers.AutoModelForCausalLM.from_pretrained(models[0], dtype="auto")
    for text, vector in zip(TEXTS, found, strict=True):
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states[-1][0].double()
        np.testing.assert_allclose(vector, hidden.mean(0).numpy(), atol=0.05)  # bf16, padded


def test_des_is_the_cosine_of_means(models, tmp_path, capsys):
    first, second = chats(tmp_path / "a.jsonl", TEXTS), chats(tmp_path / "b.jsonl", TEXTS[3:])
    status = call("similarity", first, second, "--model", models[0], "--json", tmp_path / "s.json")
    assert status == 0 and "DES" in capsys.readouterr().out
    found = json.loads((tmp_path / "s.json").read_text())
    encode = hidden_encoder(models[0], 16, -1)
    means = [encode(texts).mean(axis=0) for texts in (TEXTS, TEXTS[3:])]
    value = means[0] @ means[1] / np.linalg.norm(means[0]) / np.linalg.norm(means[1])
    assert found["pairs"][0]["value"] == pytest.approx(value, abs=1e-6) and 0 < found["pairs"][0]["spread"] < 0.5
    same = similarities({"x": encode(TEXTS), "y": encode(TEXTS)}, 1)[0]
    assert same.value == pytest.approx(1)


def test_a_sentence_encoder_is_asked(monkeypatch, tmp_path):
    """Against a stand-in for sentence-transformers."""

    class SentenceTransformer:
        def __init__(self, path, local_files_only):
            if path == "gone":
                raise OSError("no such model")

        def encode(self, texts, batch_size, show_progress_bar):
            return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)

    monkeypatch.setitem(
        sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=SentenceTransformer, __spec__=1)
    )
    assert sentence_encoder("there", 4)(["ab", "c"]).tolist() == [[2, 1], [1, 1]]
    with pytest.raises(UserError, match=r"gone: sentence-transformers cannot load it \(OSError: no such model\)"):
        sentence_encoder("gone", 4)


def test_bad_arguments_of_similarity(models, tmp_path, capsys):
    first, second = chats(tmp_path / "a.jsonl", TEXTS), tmp_path / "b.jsonl"
    second.write_text('{"text": "x"}\n{"texd": "y"}\n')
    answers = tmp_path / "c.jsonl"
    answers.write_text('{"messages": [{"role": "assistant", "content": "x"}]}\n')
    for arguments in (
        (first, first, "--model", models[0]),
        (first, second),
        (first, second, "--model", models[0], "--encoder", "x"),
        (first, second, "--model", models[0]),
        (first, answers, "--model", models[0]),
        (first, tmp_path / "none.jsonl", "--model", models[0]),
        (first, chats(tmp_path / "d.jsonl", TEXTS), "--model", tmp_path),
        (first, tmp_path / "d.jsonl", "--model", models[0], "--layer", 9),
        (first, tmp_path / "d.jsonl", "--encoder", tmp_path),
    ):
        assert call("similarity", *arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 9
    for line, words in zip(
        lines,
        (
            "each once",
            "one of the two",
            "one of the two",
            "b.jsonl:2",
            "c.jsonl:1: no turn of a user",
            "none.jsonl",
            "config.json is missing",
            "--layer",
            "sentence_transformers",
        ),
        strict=True,
    ):
        assert words in line
