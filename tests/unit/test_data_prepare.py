from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ssu.config.schema import CheckpointSection, DataSection, ModelSection, RunConfig
from megatron_ssu.config.sources import Reading
from megatron_ssu.data import jsonl
from megatron_ssu.data.indexed import CheckedIndexedDataset, check_prefix, content_digest, prepared_prefix, source_kind
from megatron_ssu.data.jsonl import LineReader, source_digest
from megatron_ssu.data.prepare import _workspace, prepare
from megatron_ssu.data.run_datasets import prepare_run
from megatron_ssu.data.tokenizer import load_tokenizer
from megatron_ssu.errors import UserError
from tests.unit.data_makers import TEXTS, make_hf_tokenizer, make_sentencepiece, write_jsonl


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_tokenizer(tmp_path_factory.mktemp("model"))


def files_of(prefix: Path) -> list[str]:
    return sorted(p.name for p in prefix.parent.iterdir() if prefix.name in p.name)


# ---- tokenizer


def test_text_is_text_and_rendered_chats_have_special_tokens(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    ids = tokenizer.encode("a <|end|> b")
    assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == "a <|end|> b"
    assert tokenizer.eos_id in tokenizer.encode_rendered("a <|end|> b")
    assert tokenizer.encode("") == [] and tokenizer.encode_batch([]) == []
    assert all(i < tokenizer.vocab_size for i in ids)


def test_chat_template_tokens_include_rendered_and_literal_ones(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    names = {tokenizer.decode([i]) for i in tokenizer.special_token_ids_of_chat_template()}
    # <|tool|> stands in a branch that no sample conversation reaches; <|pad|> is special but not the template's
    assert names == {"<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"}


def test_sentencepiece_directory(tmp_path: Path) -> None:
    folder = make_sentencepiece(tmp_path)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]
    assert (tokenizer.document_begin, tokenizer.eos_id) == ([1], 2)
    assert not tokenizer.has_chat_template and tokenizer.special_token_ids_of_chat_template() == []
    with pytest.raises(UserError, match=f"{folder}.*no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "a"}])


def test_bad_tokenizers(tmp_path: Path, model: Path) -> None:
    with pytest.raises(UserError, match="not a directory"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(UserError, match="no tokenizer in it"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"tokenizer\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)
    content = (model / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be loaded") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_digest_follows_the_vocabulary_and_not_the_template(tmp_path: Path, model: Path) -> None:
    same, other = make_hf_tokenizer(tmp_path / "same"), make_hf_tokenizer(tmp_path / "other", vocab_size=280)
    (same / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert load_tokenizer(same).digest == load_tokenizer(model).digest != load_tokenizer(other).digest


# ---- reading


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_round_trip(tmp_path: Path, model: Path, suffix: str) -> None:
    source = write_jsonl(tmp_path / f"text.jsonl{suffix}", TEXTS)
    report = prepare([source], tmp_path / "out", model)
    dataset, tokenizer = IndexedDataset(str(tmp_path / "out")), load_tokenizer(model)
    assert report.documents == len(dataset) == len(TEXTS)
    assert report.tokens == dataset.sequence_lengths.sum() and report.skipped == report.empty == 0
    for document, text in zip(dataset, TEXTS):
        assert document[-1] == tokenizer.eos_id and tokenizer.eos_id not in document[:-1]
        assert tokenizer.decode(document[:-1]) == text
    assert dataset.index.dtype is np.uint16
    assert files_of(tmp_path / "out") == ["out.bin", "out.idx", "out.json"]
    note = json.loads((tmp_path / "out.json").read_text())
    assert note["tokens"] == report.tokens and note["sources"][0]["bytes"] == source.stat().st_size == report.bytes
    assert check_prefix(tmp_path / "out", tokenizer=tokenizer).tokens == report.tokens


def test_sentencepiece_round_trip(tmp_path: Path) -> None:
    folder = make_sentencepiece(tmp_path)
    prepare([write_jsonl(tmp_path / "text.jsonl", TEXTS)], tmp_path / "out", folder)
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.decode(d[:-1].tolist()) for d in IndexedDataset(str(tmp_path / "out"))] == TEXTS


def test_text_key_empty_documents_blank_lines_and_several_frames(tmp_path: Path, model: Path) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", ["one", "", "two"], text_key="body")
    plain.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes() + b"\n  \n")
    frames = b"".join(zstandard.compress(json.dumps({"body": t}).encode() + b"\n") for t in ("three", "four"))
    (tmp_path / "b.jsonl.zst").write_bytes(frames)
    report = prepare(
        [plain, tmp_path / "b.jsonl.zst"], tmp_path / "out", model, reading=Reading("body"), append_eod=False, workers=1
    )
    tokenizer = load_tokenizer(model)
    assert (report.documents, report.empty) == (4, 1)
    texts = [tokenizer.decode(d) for d in IndexedDataset(str(tmp_path / "out"))]
    assert texts == ["one", "two", "three", "four"]


GOOD = b'{"text": "good"}\n'
BAD_LINES = [
    (b'{"text": "x"\n', r"broken JSON"),
    (b"[1]\n", r"not a JSON object but an array"),
    (b"null\n", r"not a JSON object but null"),
    (b'{"txt": "x"}\n', r"no 'text' in it \(keys: 'txt'\)"),
    (b"{}\n", r"no 'text' in it \(keys: none\)"),
    (b'{"text": 7}\n', r"'text' is not a string but a number"),
    (b'{"text": null}\n', r"'text' is not a string but null"),
    (b'{"text": "\xff"}\n', r"not UTF-8"),
    (b'{"text": "\\ud800"}\n', r"surrogate"),
    (b"[" * 100_000 + b"\n", r"broken JSON"),
    (b'{"text": "cut', r"broken JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_line_is_named_or_skipped_and_counted(tmp_path: Path, model: Path, line: bytes, message: str) -> None:
    source = tmp_path / "text.jsonl"
    source.write_bytes(GOOD + b"\n" + line.rstrip(b"\n") + b"\n" + GOOD)
    with pytest.raises(UserError, match=rf"^{source}:3: .*{message}") as error:
        prepare([source], tmp_path / "out", model)
    assert "\n" not in str(error.value)
    assert files_of(tmp_path / "out") == []
    report = prepare([source], tmp_path / "out", model, skip_bad_lines=True)
    assert (report.documents, report.skipped) == (2, 1)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flip", "other"])
def test_damaged_compressed_file(tmp_path: Path, model: Path, suffix: str, damage: str) -> None:
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, 200))) for _ in range(500)]
    source = write_jsonl(tmp_path / f"text.jsonl{suffix}", texts)
    content = bytearray(source.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flip":
        content[len(content) // 2 : len(content) // 2 + 64] = b"\xff" * 64
    else:
        content = bytearray(GOOD * 3)
    source.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{source}:\d+: "):
        prepare([source], tmp_path / "out", model, skip_bad_lines=True)
    assert files_of(tmp_path / "out") == []


def test_progress_ends_at_the_file_size(tmp_path: Path) -> None:
    for suffix in ("", ".gz", ".zst"):
        reader = LineReader(write_jsonl(tmp_path / f"text.jsonl{suffix}", TEXTS))
        assert len(list(reader)) == len(TEXTS)
        assert reader.bytes_read == reader.path.stat().st_size


def test_inputs_and_outputs_that_cannot_be(tmp_path: Path, model: Path) -> None:
    source = write_jsonl(tmp_path / "text.jsonl", TEXTS)
    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
    with pytest.raises(UserError, match=r"empty\.jsonl: no documents"):
        prepare([source, tmp_path / "empty.jsonl"], tmp_path / "out", model)
    with pytest.raises(UserError, match="no such file"):
        prepare([tmp_path / "missing.jsonl"], tmp_path / "out", model)
    with pytest.raises(UserError, match="a folder"):
        prepare([tmp_path], tmp_path / "out", model)
    with pytest.raises(UserError, match="workers: 0"):
        prepare([source], tmp_path / "out", model, workers=0)
    with pytest.raises(UserError, match=r"text\.jsonl: cannot be written"):
        prepare([source], source / "out", model)
    assert files_of(tmp_path / "out") == []
    prepare([source], tmp_path / "out", model)
    before = (tmp_path / "out.bin").read_bytes()
    shorter = write_jsonl(tmp_path / "shorter.jsonl", TEXTS[:2])
    with pytest.raises(UserError, match="exists already"):
        prepare([shorter], tmp_path / "out", model)
    assert (tmp_path / "out.bin").read_bytes() == before
    assert prepare([shorter], tmp_path / "out", model, overwrite=True).documents == 2
    assert check_prefix(tmp_path / "out").documents == 2


@pytest.mark.process
def test_full_disk(tmp_path: Path, model: Path) -> None:
    source = write_jsonl(tmp_path / "text.jsonl", TEXTS * 400)
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from megatron_ssu.data.prepare import prepare\n"
        "from megatron_ssu.errors import UserError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try: prepare([sys.argv[1]], sys.argv[2], sys.argv[3])\n"
        "except UserError as e: print(e); sys.exit(2)\n"
    )
    arguments = [sys.executable, "-c", script, str(source), str(tmp_path / "out"), str(model)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "out.bin: cannot be written (File too large)" in done.stdout
    assert files_of(tmp_path / "out") == []


# ---- processes


@pytest.mark.process
def test_two_workers_write_the_bytes_of_one(tmp_path: Path, model: Path) -> None:
    lines = [f"{i} {t}" for i in range(300) for t in TEXTS]
    source = write_jsonl(tmp_path / "text.jsonl", lines)
    one = prepare([source], tmp_path / "one", model, workers=1)
    two = prepare([source], tmp_path / "two", model, workers=2, small_input=0)
    assert one.documents == two.documents == len(lines)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
    source.write_bytes(source.read_bytes() + b"{broken\n")
    with pytest.raises(UserError, match=rf"{source}:{len(lines) + 1}: broken JSON"):
        prepare([source], tmp_path / "three", model, workers=2, small_input=0)
    assert files_of(tmp_path / "three") == []


@pytest.mark.process
@pytest.mark.parametrize(
    ("number", "workers", "status"),
    [pytest.param(signal.SIGTERM, 2, 143, marks=pytest.mark.slow), (signal.SIGINT, 1, 130)],
)
def test_interrupt_leaves_nothing(tmp_path: Path, model: Path, number: int, workers: int, status: int) -> None:
    source = write_jsonl(tmp_path / "text.jsonl", [" ".join(TEXTS) * 20] * 6000)
    script = tmp_path / "main.py"
    script.write_text(
        "import signal, sys\n"
        "from megatron_ssu.data.prepare import prepare\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background inherit it ignored\n"
        "    try:\n"
        "        prepare([sys.argv[1]], sys.argv[2], sys.argv[3], workers=int(sys.argv[4]), small_input=0)\n"
        "    except KeyboardInterrupt:\n"
        "        sys.exit(130)\n"
    )
    out = tmp_path / "folder" / "out"
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    arguments = [sys.executable, str(script), str(source), str(out), str(model), str(workers)]
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 600
        while not [f for f in out.parent.glob(".out.*/data.bin") if f.stat().st_size > 0]:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status
    assert list(out.parent.iterdir()) == []


@pytest.mark.process
def test_a_dying_tokenizer_process_leaves_nothing(tmp_path: Path, model: Path) -> None:
    source = write_jsonl(tmp_path / "text.jsonl", [" ".join(TEXTS) * 20] * 6000)

    def kill_one() -> None:
        while not [f for f in tmp_path.glob(".out.*/data.bin") if f.stat().st_size > 0]:
            time.sleep(0.05)
        for process in multiprocessing.active_children()[:1]:
            process.kill()

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    with pytest.raises(UserError, match="a tokenizer process died"):
        prepare([source], tmp_path / "out", model, workers=2, small_input=0)
    killer.join()
    assert files_of(tmp_path / "out") == []


WORKSPACE = """
import pathlib, sys, time
from megatron_ssu.data import prepare
with prepare._workspace(pathlib.Path(sys.argv[1])) as folder:
    (folder / "data.bin").write_bytes(b"half")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.mark.process
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", WORKSPACE, str(tmp_path / "out")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        assert theirs.name.startswith(f".out.{socket.gethostname()}-{process.pid}-")
        with _workspace(tmp_path / "out"):
            assert (theirs / "data.bin").exists()
    finally:
        process.kill()
        process.wait()
    assert theirs.exists()
    with _workspace(tmp_path / "out"):
        assert not theirs.exists()
    assert files_of(tmp_path / "out") == []


def test_workspaces_of_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of hosts whose names begin with ours, and of processes that are about to make their lock file."""
    others = [".out.vm-2-123-abcdefgh.tmp", ".out.vm-2-123.tmp", ".out2.vm-123-abcdefgh.tmp", ".out.vm-123-notyet1.tmp"]
    old = ".out.vm-123.tmp"  # old, and without a lock file
    for name in (*others, old):
        (tmp_path / name).mkdir()
        if "notyet" not in name and name != old:
            (tmp_path / name / "lock").touch()
    os.utime(tmp_path / old, (0, 0))
    monkeypatch.setattr(socket, "gethostname", lambda: "vm")
    with _workspace(tmp_path / "out"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(others)


# ---- datasets on disk


def test_prepared_prefix_depends_on_content_tokenizer_and_key(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a" / "text.jsonl.gz", TEXTS)
    copy = write_jsonl(tmp_path / "b" / "text.jsonl.gz", TEXTS)
    copy.write_bytes(source.read_bytes())
    os.utime(copy, (0, 0))
    name = prepared_prefix(tmp_path, source, "d")
    assert name.parent == tmp_path and name.name.startswith("text-") and len(name.name) == len("text-") + 12
    assert prepared_prefix(tmp_path, copy, "d") == name
    assert (
        len({name, *(prepared_prefix(tmp_path, source, d, Reading(k)) for d, k in (("e", "text"), ("d", "body")))}) == 3
    )
    assert prepared_prefix(tmp_path, source, "d", chat_template="{{ messages }}") != name
    copy.write_bytes(gzip.compress(b"other"))
    assert prepared_prefix(tmp_path, copy, "d") != name


def test_a_large_source_is_known_by_its_content_and_not_by_its_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that are sampled: a block's change is seen wherever blocks are read, a copy or `touch` is none."""
    monkeypatch.setattr(jsonl, "_WHOLE_FILE_BYTES", 32 << 20)
    monkeypatch.setattr(jsonl, "_SAMPLED_BLOCKS", 32)
    size = 96 << 20

    def large(name: str, *changes: int, size: int = size) -> str:
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
            for offset in changes:
                file.seek(offset)
                file.write(b"x")
        return source_digest(tmp_path / name)

    first = large("a.jsonl", 7)
    os.utime(tmp_path / "a.jsonl", (0, 0))
    assert source_digest(tmp_path / "a.jsonl") == first == large("b.jsonl", 7)
    middle = 16 * (size - (1 << 20)) // 31 + 5
    others = [
        large("c.jsonl"),
        large("d.jsonl", 7, middle),
        large("e.jsonl", 7, size - 1),
        large("f.jsonl", 7, size=size + 1),
    ]
    assert len({first, *others}) == 5


def test_a_dataset_without_its_index_is_prepared_again(tmp_path: Path, model: Path) -> None:
    source = write_jsonl(tmp_path / "text.jsonl", TEXTS)
    run = RunConfig(
        model=ModelSection(path=str(model)),
        checkpoint=CheckpointSection(directory=str(tmp_path / "run")),
        data=DataSection(train=str(source)),
    )
    (prefix, _), *_ = prepare_run(run, load_tokenizer(model))[0].train
    Path(f"{prefix}.idx").unlink()  # as after a kill between the renames
    assert prepare_run(run, load_tokenizer(model))[1]
    check_prefix(prefix)
    assert not prepare_run(run, load_tokenizer(model))[1]


def test_content_digest_follows_the_documents(tmp_path: Path, model: Path) -> None:
    def digest(name: str, texts: list[str]) -> str:
        prepare([write_jsonl(tmp_path / f"{name}.jsonl", texts)], tmp_path / name, model)
        return content_digest(tmp_path / name)

    first = digest("a", ["one two", "three"])
    assert digest("b", ["one two", "three"]) == first
    assert digest("c", ["two one", "three"]) != first  # as many tokens, other ones
    (tmp_path / "a.json").unlink()
    assert content_digest(tmp_path / "a") != first


def test_source_kind(tmp_path: Path, model: Path) -> None:
    source = write_jsonl(tmp_path / "text.jsonl", TEXTS)
    prepare([source], tmp_path / "out", model)
    assert (source_kind(source), source_kind(tmp_path / "out")) == ("jsonl", "indexed")
    for path, message in ((tmp_path / "out.bin", "by its prefix"), (tmp_path / "none", "neither")):
        with pytest.raises(UserError, match=message):
            source_kind(path)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("out.bin", lambda b: b[:-6], r"out\.bin: ends at offset \d+, but out\.idx lists"),
        ("out.bin", None, r"out\.bin: missing"),
        ("out.idx", None, r"out\.idx: missing"),
        ("out.idx", lambda b: b[:20], r"out\.idx: ends at offset 20, within its header"),
        ("out.idx", lambda b: b"", r"out\.idx: ends at offset 0"),
        ("out.idx", lambda b: b[:-8], r"out\.idx: \d+ bytes long, its header asks for"),
        ("out.idx", lambda b: b"X" + b[1:], r"out\.idx: offset 0"),
        ("out.idx", lambda b: b[:9] + b"\x02" + b[10:], r"out\.idx: offset 9: version 2"),
        ("out.idx", lambda b: b[:17] + b"\x63" + b[18:], r"out\.idx: offset 17"),
        ("out.idx", lambda b: b[:17] + b"\x07" + b[18:], r"out\.idx: offset 17"),
        ("out.idx", lambda b: b[:37] + b"\xff" + b[38:], r"out\.idx: offset 34: sequence 0 has length -"),
        ("out.idx", lambda b: b[:34] + b"\x01" + b[35:], r"out\.idx: offset \d+: sequence 1 starts at"),
        ("out.idx", lambda b: b[:-8] + b"\x01" + b[-7:], r"document boundaries"),
        ("out.json", lambda b: b"{", r"out\.json: not metadata"),
        ("out.json", lambda b: b'{"tokenizer": "abc"}', r"out\.json: tokenized with another tokenizer"),
    ],
)
def test_check_prefix(tmp_path: Path, model: Path, file: str, change, message: str) -> None:
    prepare([write_jsonl(tmp_path / "text.jsonl", TEXTS)], tmp_path / "out", model)
    path = tmp_path / file
    path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        check_prefix(tmp_path / "out", tokenizer=load_tokenizer(model))


def test_reads_name_file_and_offset(tmp_path: Path, model: Path) -> None:
    prepare([write_jsonl(tmp_path / "text.jsonl", TEXTS)], tmp_path / "out", model)
    vocab = load_tokenizer(model).vocab_size
    dataset = CheckedIndexedDataset(str(tmp_path / "out"), vocab)
    path = tmp_path / "out.bin"
    content = path.read_bytes()
    start = int(dataset.index.sequence_pointers[3])
    with open(path, "r+b") as file:  # in place: the dataset holds this very file open
        file.seek(start + 2)
        file.write(b"\xff\xff")
    with pytest.raises(UserError, match=rf"out\.bin: offset {start + 2}: token 65535 is outside the vocabulary"):
        dataset[3]
    os.truncate(path, start + 2)
    with pytest.raises(UserError, match=rf"out\.bin: ends at offset {start + 2}, "):
        dataset[3]
    np.testing.assert_array_equal(dataset[0], np.frombuffer(content, np.uint16)[: len(dataset[0])])


def test_chats_are_rendered_with_the_template_and_text_is_not(tmp_path: Path, model: Path) -> None:
    tokenizer = load_tokenizer(model)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    source = tmp_path / "mixed.jsonl"
    source.write_text(json.dumps({"text": "<|end|> plain"}) + "\n" + json.dumps({"messages": chat}) + "\n")
    prepare([source], tmp_path / "out", model, workers=1)
    text, rendered = (document.tolist() for document in IndexedDataset(str(tmp_path / "out")))
    assert text == [*tokenizer.encode("<|end|> plain"), tokenizer.eos_id] and tokenizer.eos_id not in text[:-1]
    expected = tokenizer.encode_rendered(tokenizer.render_chat(chat))
    assert rendered == (expected if expected[-1] == tokenizer.eos_id else [*expected, tokenizer.eos_id])


def test_a_chat_that_cannot_be_rendered_is_named(tmp_path: Path, model: Path) -> None:
    source = tmp_path / "chats.jsonl"
    source.write_text(json.dumps({"messages": []}) + "\n")
    with pytest.raises(UserError, match=r"chats.jsonl:1: 'messages' is not a list of turns"):
        prepare([source], tmp_path / "out", model, workers=1)
