"""Sources of rows: the same documents whatever the format; columns by name; what cannot be read is named."""

from __future__ import annotations

import json

import pytest

from megatron_ssu.config.load import load_run
from megatron_ssu.config.schema import CheckpointSection, DataSection, DataSource, ModelSection, RunConfig
from megatron_ssu.config.sources import Reading, reading, train_sources
from megatron_ssu.data.prepare import prepare
from megatron_ssu.data.rows import is_hub_id, open_rows, rows_digest
from megatron_ssu.errors import UserError
from tests.unit.data_makers import TEXTS, make_hf_tokenizer

pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
datasets = pytest.importorskip("datasets", reason="needs datasets")

ROWS = [
    {"conversation": [{"role": "user", "content": t}, {"role": "assistant", "content": t[::-1]}], "id": i}
    for i, t in enumerate(TEXTS * 30)
]
ROWS[3]["conversation"][0]["name"] = "somebody"  # a field that other rows lack
COLUMNS = (("messages", "conversation"),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same rows in every format, and a tokenizer in `model`."""
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("rows")
    make_hf_tokenizer(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=50)
    (folder / "parts").mkdir()
    for number, begin in enumerate(range(0, len(ROWS), 100)):
        pyarrow.parquet.write_table(table.slice(begin, 100), folder / "parts" / f"{number}.parquet")
    with pyarrow.ipc.new_file(str(folder / "file.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    with pyarrow.ipc.new_stream(str(folder / "stream.arrow"), table.schema) as writer:
        writer.write_table(table)
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(str(folder / "saved"))
    datasets.DatasetDict({"train": saved.select(range(5)), "dev": saved}).save_to_disk(str(folder / "splits"))
    return folder


FORMATS = ("rows.parquet", "parts", "file.arrow", "stream.arrow", "saved")


@pytest.mark.parametrize(("name", "split"), [*((name, "train") for name in FORMATS), ("splits", "dev")])
def test_the_same_rows_give_the_same_tokens(folder, tmp_path, name, split):
    def made(source, out):
        how = Reading(columns=COLUMNS, split=split, loss_on="answers")
        report = prepare([folder / source], tmp_path / out, folder / "model", reading=how, workers=1)
        return report.documents, [(tmp_path / f"{out}.{end}").read_bytes() for end in ("bin", "idx", "loss")]

    assert made(name, "other") == made("rows.jsonl", "jsonl")
    reader = open_rows(folder / name, Reading(split=split))
    assert [number for number, _ in reader] == list(range(1, len(ROWS) + 1)) and reader.bytes_read > 0


def test_digests_follow_the_content(folder, tmp_path):
    digests = {name: rows_digest(folder / name, Reading()) for name in (*FORMATS, "splits")}
    assert len(set(digests.values())) == len(digests)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in (folder / "parts").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert rows_digest(copy, Reading()) == digests["parts"]
    (copy / "0.parquet").write_bytes((copy / "1.parquet").read_bytes())
    assert rows_digest(copy, Reading()) != digests["parts"]


def test_columns_have_their_own_names(folder, tmp_path):
    rows = [{"frage": "Columns?", "antwort": "learn", "instruction": "unread"}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"instruction": "Columns?", "output": "learn"}) + "\n")
    how = Reading(columns=(("instruction", "frage"), ("output", "antwort")))
    prepare([tmp_path / "a.jsonl"], tmp_path / "a", folder / "model", reading=how, workers=1)
    prepare([tmp_path / "b.jsonl"], tmp_path / "b", folder / "model", workers=1)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ((("messages", "chat"),), {"chat": ROWS[0]["conversation"]}),
        ((("prompt", "q"), ("completion", "a")), {"q": "Columns?", "a": "learn"}),
        ((("instruction", "q"), ("output", "a")), {"q": "Columns?", "a": "learn"}),
        ((("text", "body"),), {"body": "Columns?"}),
    ],
)  # fmt: skip
def test_mapped_columns_win_over_what_else_is_in_the_row(folder, tmp_path, columns, row):
    others = {
        "text": "unread",
        "messages": [{"role": "user", "content": "unread"}],
        "prompt": "unread",
        "completion": "x",
    }
    for name, given in (("a", row), ("b", others | row)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(given) + "\n")
        prepare(
            [tmp_path / f"{name}.jsonl"], tmp_path / name, folder / "model", reading=Reading(columns=columns), workers=1
        )
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_a_folder_of_parquet_files_has_the_splits_that_its_names_say(folder, tmp_path):
    for name, number in (("train-00000-of-00002", 0), ("train-00001-of-00002", 1), ("test-00000-of-00001", 0)):
        (tmp_path / f"{name}.parquet").write_bytes((folder / "parts" / f"{number}.parquet").read_bytes())
    assert [len(list(open_rows(tmp_path, Reading(split=s)))) for s in ("train", "test")] == [len(ROWS), 100]
    assert len({rows_digest(tmp_path, Reading(split=s)) for s in ("train", "test")}) == 2
    with pytest.raises(UserError, match=r"split must be one of test, train, got 'validation'"):
        list(open_rows(tmp_path, Reading(split="validation")))
    with pytest.raises(UserError, match=r"subset must be left out for files, got 'small'"):
        list(open_rows(tmp_path, Reading(subset="small")))
    for name in ("parts", "saved"):
        with pytest.raises(UserError, match=rf"{name}: split must be left out, got 'test'"):
            list(open_rows(folder / name, Reading(split="test")))


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        (
            "rows.parquet",
            Reading(columns=(("messages", "talk"),)),
            r"rows\.parquet:1: no column 'talk' in it \(columns: 'conv",
        ),
        ("rows.parquet", Reading(), r"rows\.parquet:1: no 'text' in it"),
        ("splits", Reading(split="test"), r"splits: split must be one of train, dev, got 'test'"),
        ("torn.parquet", Reading(), r"torn\.parquet: cannot be read as a dataset"),
        ("torn.arrow", Reading(), r"torn\.arrow: cannot be read as a dataset"),
    ],
)
def test_what_cannot_be_read_is_named(folder, tmp_path, name, how, message):
    for file in ("rows.parquet", "file.arrow"):
        torn = folder / f"torn.{file.rpartition('.')[2]}"
        torn.write_bytes((folder / file).read_bytes()[:300])
    with pytest.raises(UserError, match=message) as error:
        prepare([folder / name], tmp_path / "out", folder / "model", reading=how, workers=1)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("out*"))


def test_a_dataset_on_the_hub_is_asked_for_by_its_name(folder, tmp_path, monkeypatch):
    assert is_hub_id("somebody/chats") and not is_hub_id(folder / "saved") and not is_hub_id("a/b/c")
    asked = []

    def load(path, name):
        asked.append((path, name))
        if name == "offline":
            raise ConnectionError("Couldn't reach 'somebody/chats' on the Hub")
        return datasets.load_from_disk(str(folder / "splits"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    how = Reading(columns=COLUMNS, subset="small")
    report = prepare(["somebody/chats"], tmp_path / "out", folder / "model", reading=how, workers=1)
    assert report.documents == 5 and asked[0] == ("somebody/chats", "small")
    with pytest.raises(
        UserError, match=r"somebody/chats: cannot be read as a dataset \(ConnectionError: Couldn't reach"
    ):
        prepare(["somebody/chats"], tmp_path / "b", folder / "model", reading=Reading(subset="offline"), workers=1)


def test_a_source_takes_from_the_section_what_it_does_not_say():
    data = DataSection(train=["a", DataSource("b", loss_on="all", wrap="answer", columns={"text": "body"})])
    data.loss_on, data.packing, data.wrap_prompt, data.text_key = "answers", "documents", "Go on.", "body"
    run = RunConfig(ModelSection("m"), CheckpointSection("c"), data=data)
    first, second = train_sources(run)
    assert (first.loss_on, first.packing, first.wrap) == ("answers", "documents", "none")
    assert reading(run, first) == Reading("body", loss_on="answers")
    assert reading(run, second) == Reading("body", (("text", "body"),), wrap="answer", wrap_prompt="Go on.")


def test_a_source_may_say_none_where_the_section_says_something(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "model: {path: m}\ncheckpoint: {directory: c}\ndata:\n  packing: documents\n  wrap: answer\n"
        "  train: [a, {path: b, packing: none, wrap: none}]\n"
    )
    first, second = train_sources(load_run(tmp_path / "run.yaml"))
    assert (first.packing, first.wrap, second.packing, second.wrap) == ("documents", "answer", "none", "none")
