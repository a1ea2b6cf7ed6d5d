"""Packed rows of documents that do not attend to each other against the same documents one by one in plain transformers; and
what runs over blends have really read."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from megatron_ssu.config.sources import Reading
from megatron_ssu.data.packing import Layout, best_fit, sample_of
from megatron_ssu.data.prepare import prepare
from tests.dist import packing_work as work
from tests.dist.ranks import RankError
from tests.dist.test_methods import make_world
from tests.dist.work import mesh
from tests.models import make_model

S, ROWS = 32, 8
MESHES = {
    "TP1": (1, mesh()),
    "TP2": (2, mesh(2)),
    "TP2+SP": (2, mesh(2, sequence=True)),
    "PP2": (2, mesh(1, 2)),
    "TP2xPP2xVPP2": (4, mesh(2, 2, 2)),
}


def documents(seed=0):
    """Documents of 3 to 30 random tokens, of which a tail has loss, that fill ROWS rows."""
    draw, found = np.random.default_rng(seed), []
    while True:
        ids = draw.integers(0, 100, size=draw.integers(3, 31))
        mask = (np.arange(len(ids)) >= draw.integers(1, len(ids))).astype(np.uint8)
        places = np.array([len(d) - 1 for d, _ in (*found, (ids, mask))])
        if len(best_fit(places, S)) > ROWS:
            return found
        found.append((ids, mask))


def rows_of(found, isolated=True):
    rows = best_fit(np.array([len(ids) - 1 for ids, _ in found]), S)
    return [sample_of([found[i] for i in row], Layout(S, 7, isolated)) for row in rows]


def expected(path, found):
    """Mean loss over all tokens with loss, and its gradients, one document at a time in transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    total, count = 0.0, sum(int(mask[1:].sum()) for _, mask in found)
    for ids, mask in found:
        logits = model(torch.from_numpy(ids)[None]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[1:]), reduction="none")
        loss = (losses * torch.from_numpy(mask[1:].astype(np.float32))).sum() / count
        loss.backward()
        total += float(loss)
    return total, {name: param.grad for name, param in model.named_parameters()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packing")
    return {kind: make_model(kind, folder / kind) for kind in ("olmo2", "llama3", "mistral", "olmo3")}


@pytest.mark.parametrize(
    ("kind", "place", "micro", "recompute"),
    [
        *[("olmo2", place, 2, {}) for place in MESHES],
        ("olmo2", "TP1", 8, {}),
        ("olmo2", "TP1", 1, {}),
        ("llama3", "TP1", 4, {}),
        ("mistral", "TP2+SP", 4, {}),
        ("olmo3", "TP1", 4, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
        ("llama3", "TP2+SP", 4, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
    ],
)  # fmt: skip
def test_packed_documents_are_as_if_each_were_alone(ranks, models, tmp_path, kind, place, micro, recompute):
    found = documents()
    size, parallel = MESHES[place]
    target = str(tmp_path / "gradients")
    result = ranks.run(
        work.gradients, size, str(models[kind]), parallel, rows_of(found), micro, target, transformer=recompute
    )[0]
    loss, gradients = expected(models[kind], found)
    assert result["loss"] == pytest.approx(loss, abs=1e-5)
    assert result["evaluated"] == pytest.approx(loss, abs=1e-5)
    own = load_file(f"{target}/model.safetensors")
    assert set(own) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            own[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_documents_that_see_each_other_are_another_model(ranks, models, tmp_path):
    """The test above can fail: without isolation it does."""
    found = documents()
    result = ranks.run(
        work.gradients, 1, str(models["olmo2"]), mesh(), rows_of(found, isolated=False), 2, str(tmp_path / "g")
    )[0]
    assert abs(result["loss"] - expected(models["olmo2"], found)[0]) > 1e-3


def test_the_divergence_from_the_source_is_over_the_same_tokens(ranks, models, tmp_path):
    from megatron_ssu.config.schema import RegularizeSection

    found = documents()
    for place in ("TP1", "PP2"):
        size, parallel = MESHES[place]
        result = ranks.run(
            work.gradients,
            size,
            str(models["olmo2"]),
            parallel,
            rows_of(found),
            2,
            str(tmp_path / place),
            regularize=RegularizeSection(kl=0.5),
        )[0]
        loss, gradients = expected(models["olmo2"], found)
        assert result["loss"] == pytest.approx(loss, abs=1e-5) and result["terms"]["kl"] == pytest.approx(0, abs=1e-6)
        own = load_file(f"{tmp_path / place}/model.safetensors")
        for name, gradient in gradients.items():  # the source is the model: its divergence has no gradient yet
            torch.testing.assert_close(own[name], gradient, atol=1e-5, rtol=1e-4)


# ---- whole runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("blends"))


def write(world, name, data, **train):
    run = {
        "model": {"path": "hf/source"},
        "method": {"name": "none"},
        "precision": {"dtype": "fp32"},
        "checkpoint": {"directory": f"runs/{name}", "interval": 0},
        "data": {"sequence_length": 64, "loader_workers": 0, "target_valid": "world/target_valid.jsonl", **data},
        "train": {
            **{"iterations": 20, "micro_batch_size": 2, "global_batch_size": 16, "eval_interval": 0, "eval_batches": 1},
            **train,
        },
        "log": {"interval": 5, "tensorboard": False},
    }
    (world / f"{name}.yaml").write_text(yaml.safe_dump(run))
    return str(world / f"{name}.yaml")


CHATS, TEXT = "world/chat.jsonl", "world/target_train.jsonl"


def tokens_of(world, result):
    """Tokens without padding of chats and of text among rows: a chat has the user's token in it, padding of a row has not."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "hf" / "source")
    user, found = tokenizer.convert_tokens_to_ids("<|user|>"), Counter()
    for row, positions in zip(result["rows"], result["positions"], strict=True):
        starts = [i for i, place in enumerate(positions) if place == 0]
        documents = [row[a:b] for a, b in zip(starts, [*starts[1:], len(row)], strict=True)]
        if user in row:
            found["chats"] += sum(len(document) for document in documents if user in document)
        else:
            found["text"] += len(row)
    return found


BLEND = {
    "weights_in": "tokens",
    "train": [
        {"path": CHATS, "weight": 0.3, "packing": "documents", "loss_on": "answers"},
        {"path": TEXT, "weight": 0.7},
    ],
}


@pytest.mark.parametrize(
    ("size", "overrides"), [(1, []), (2, []), (4, ["parallel.tensor_model_parallel_size=2"]), (4, [])]
)
def test_realised_tokens_are_those_asked_for(ranks, world, size, overrides):
    name = f"blend-{size}-{len(overrides)}"
    result = ranks.run(work.counted_run, size, write(world, name, BLEND, iterations=30), str(world), overrides)[0]
    assert len(result["rows"]) == 30 * 16
    found = tokens_of(world, result)
    assert found["chats"] / found.total() == pytest.approx(0.3, rel=0.01)
    last = [line for line in result["metrics"] if f"tokens_read/{CHATS}" in line][-1]
    assert last[f"tokens_read/{CHATS}"] == found["chats"]
    assert last[f"tokens_read/{TEXT}"] == found["text"]
    assert f"read of {CHATS}: " in result["said"]


def test_weights_that_change_on_resume_lose_and_repeat_nothing(ranks, world):
    first = write(world, "changed", BLEND, iterations=24)
    before = ranks.run(work.counted_run, 2, first, str(world), [], stop=10)[0]["rows"]
    other = json.loads(json.dumps(BLEND))
    other["train"][0]["weight"], other["train"][1]["weight"] = 0.6, 0.4
    other["train"].append({"path": "world/source_train.jsonl", "weight": 0.25})
    result = ranks.run(work.counted_run, 4, write(world, "changed", other, iterations=24), str(world), [])[0]
    assert len(before) == 10 * 16 and len(result["rows"]) == 14 * 16
    share = tokens_of(world, result)
    assert share["chats"] / share.total() == pytest.approx(0.6 / 1.25, rel=0.015)
    straight = ranks.run(
        work.counted_run, 1, write(world, "alone", {"train": [BLEND["train"][1]]}, iterations=12), str(world), []
    )[0]
    text = [tuple(row) for row in straight["rows"]]  # the order of the text, from its beginning
    order = {row: place for place, row in enumerate(text)}
    read = [order[tuple(row)] for row in [*before, *result["rows"]] if tuple(row) in order]
    assert sorted(read) == list(range(len(read))), "every window of the text once, from its first on"
    chats = Counter(tuple(row) for row in [*before, *result["rows"]] if tuple(row) not in order)
    with_user = [
        row
        for row in chats
        if transformers.AutoTokenizer.from_pretrained(world / "hf" / "source").convert_tokens_to_ids("<|user|>") in row
    ]
    assert max(chats[row] for row in with_user) <= 2, "a row of chats comes again in the next epoch at the earliest"


def test_unchanged_weights_resume_to_the_same_order(ranks, world):
    ramp = json.loads(json.dumps(BLEND))
    ramp["train"][0]["weight"] = {"start": 0.5, "end": 0.1}
    straight = ranks.run(work.counted_run, 2, write(world, "ramp", ramp), str(world), [])[0]["rows"]
    file = write(world, "ramp-stopped", ramp)
    first = ranks.run(work.counted_run, 2, file, str(world), [], stop=6)[0]["rows"]
    second = ranks.run(work.counted_run, 1, file, str(world), [], stop=5)[0]["rows"]
    third = ranks.run(work.counted_run, 4, file, str(world), [])[0]["rows"]
    assert Counter(map(tuple, first + second + third)) == Counter(map(tuple, straight))


@pytest.mark.parametrize("packing", ["documents", "none"])
def test_epochs_read_every_chat_so_often(ranks, world, packing):
    data = {"train": CHATS, "packing": packing, "loss_on": "answers", "sequence_length": 96}
    result = ranks.run(
        work.counted_run, 2, write(world, f"epochs-{packing}", data, iterations=-1, epochs=2), str(world), []
    )[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "hf" / "source")
    user, eos = tokenizer.convert_tokens_to_ids("<|user|>"), tokenizer.eos_token_id
    rows = [json.loads(line)["messages"] for line in (world / CHATS).read_text().splitlines()]
    wanted = Counter(
        tuple(tokenizer(tokenizer.apply_chat_template(m, tokenize=False), add_special_tokens=False)["input_ids"][:-1])
        for m in rows
    )
    read = Counter()
    for row in result["rows"]:
        starts = [i for i in range(len(row) - 1) if row[i] == eos and row[i + 1] == user]
        for a, b in zip(starts, [*starts[1:], len(row)], strict=True):
            document = row[a:b]
            while document and document[-1] == eos:
                document.pop()
            read[tuple(document)] += 1
    extra = sum(read.values()) - 2 * sum(wanted.values())
    assert set(read) == set(wanted) and all(read[key] >= 2 * count for key, count in wanted.items())
    assert 0 <= extra < 16 * 96 // 4, "the last global batch is filled from the next epoch"


@pytest.mark.parametrize("unit", ["samples", "tokens", "epochs"])
def test_an_epoch_is_one_beside_replay_too(ranks, world, unit):
    """Samples of replay hold other numbers of tokens than those that they come on top of."""
    data = {"train": [{"path": CHATS, "packing": "none", "loss_on": "answers"}], "weights_in": unit}
    overrides = ["replay.fraction=0.2", f"replay.path=[{{path: {TEXT}, packing: stream}}]", "train.global_batch_size=2"]
    file = write(world, f"replayed-{unit}", data, iterations=-1, epochs=1)
    result = ranks.run(work.counted_run, 1, file, str(world), overrides)[0]
    last = [line for line in result["metrics"] if f"epochs_read/{CHATS}" in line][-1]
    assert last[f"epochs_read/{CHATS}"] == pytest.approx(1, abs=0.01)
    what = "samples_read" if unit == "samples" else "tokens_read"
    read = [last[f"{what}/{path}"] for path in (CHATS, TEXT)]
    assert read[1] / sum(read) == pytest.approx(0.2, rel=0.02)


@pytest.mark.parametrize(("made", "asked"), [("answers", "all"), ("all", "answers")])
@pytest.mark.parametrize("key", ["train", "target_valid"])
def test_a_prepared_dataset_has_loss_where_the_run_says(ranks, world, made, asked, key):
    prefix = world / f"prepared-{made}"
    if not prefix.with_suffix(".idx").exists():
        prepare([world / CHATS], prefix, world / "hf" / "source", reading=Reading(loss_on=made), workers=1)
    data = {"train": CHATS, "loss_on": asked, "packing": "documents"} | {key: prefix.name}
    with pytest.raises(RankError) as caught:
        ranks.run(work.counted_run, 1, write(world, "refused", data), str(world), [])
    words = f"{prefix.name}: loss_on must be {made}, as the dataset was prepared, got {asked}"
    assert caught.value.kind == "UserError" and words in caught.value.message
    data["loss_on"] = made
    ranks.run(work.counted_run, 1, write(world, f"{key}-{made}", data, iterations=1), str(world), [])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"train": [{"path": TEXT, "weight": {"start": 0.0, "end": 0.0}}]}, ("data.train.0.weight", "must be above 0")),
        ({"train": [{"path": TEXT, "weight": -0.5}]}, ("data.train.0.weight", "must be above 0", "-0.5")),
        ({"train": [{"path": CHATS, "columns": {"massages": "messages"}}]}, ("data.train.0.columns", "massages", "messages")),
        ({"train": [{"path": CHATS, "columns": {"messages": "talk"}}]}, ("chat.jsonl:1", "no column 'talk'")),
        ({"train": TEXT, "wrap": "answers"}, ("data.wrap", "'none' or 'answer'")),
        ({"train": CHATS, "packing": "none", "too_long": "refuse", "sequence_length": 8}, ("chat.jsonl: document", "tokens")),
        ({"train": CHATS, "packing": "documents", "loss_on": "answers", "sequence_length": 2}, ("chat.jsonl", "none of its")),
        ({"train": "world/none.parquet"}, ("data.train", "none.parquet", "does not exist")),
        ({"train": "world/bad.jsonl", "loss_on": "answers"}, ("bad.jsonl:2", "no turn of the assistant")),
        ({"train": TEXT, "weights_in": "bytes"}, ("data.weights_in", "'samples', 'tokens' or 'epochs'")),
    ],
)  # fmt: skip
def test_bad_data_is_one_line_before_training(ranks, world, data, words):
    good, bad = (
        {"messages": [{"role": r, "content": "x"} for r in roles]} for roles in (("user", "assistant"), ("user",))
    )
    (world / "world" / "bad.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    with pytest.raises(RankError) as caught:
        ranks.run(work.counted_run, 2, write(world, "refused", data), str(world), [])
    message = caught.value.message
    assert caught.value.kind == "UserError" and "\n" not in message, message
    assert all(word in message for word in words), message
    assert not (world / "runs" / "refused" / "checkpoints").exists()
