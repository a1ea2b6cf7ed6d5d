from __future__ import annotations

import os
import signal
from itertools import islice
from multiprocessing import current_process, resource_sharer
from multiprocessing.connection import Client
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from megatron_ssu.config.schema import DataSection, DataSource
from megatron_ssu.data.datasets import Parts, Settings, build_valid
from megatron_ssu.data.loader import _raise_errors, iterate, lost_loader
from megatron_ssu.data.prepare import prepare
from megatron_ssu.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ssu.errors import UserError
from tests.unit.data_makers import TEXTS, make_hf_tokenizer, write_jsonl

S = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Indexed datasets `a` (English) and `b` (digits), and the tokenizer they were made with in `model`."""
    folder = tmp_path_factory.mktemp("data")
    model = make_hf_tokenizer(folder / "model")
    texts = {"a": [f"{t} {t}" for _ in range(20) for t in TEXTS], "b": [f"{i:064b}" for i in range(100)]}
    for name, documents in texts.items():
        prepare([write_jsonl(folder / f"{name}.jsonl", documents)], folder / name, model)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder / "model")


def build(folder: Path, tokenizer: Tokenizer, cache: Path, **changed):
    settings = {
        "sources": [(folder / "a", 1.0)],
        "sequence_length": S,
        "split": "80,20,0",
        "seed": 7,
        "train_samples": 50,
        "valid_samples": 8,
        "cache_dir": cache,
    }
    settings.update(changed)
    sources = [
        (path, DataSource(str(path), weight, packing="stream", too_long="truncate"))
        for path, weight in settings["sources"]
    ]
    common = Settings(settings["sequence_length"], settings["split"], settings["seed"])
    parts = Parts(sources, tokenizer, common, settings["cache_dir"], with_valid=settings["valid_samples"] > 0)
    valid = parts.valid(settings["valid_samples"]) if settings["valid_samples"] else None
    return parts.blend(settings["train_samples"])[0], valid


def stream_of(prefix: Path) -> list[int]:
    return np.fromfile(f"{prefix}.bin", np.uint16).tolist()


# ---- through megatron's GPTDataset


def test_train_samples_are_shifted_pieces_of_the_documents(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    train, valid = build(folder, tokenizer, tmp_path)
    assert len(train) >= 50 and len(valid) >= 8
    ends = 0
    for i in range(50):
        sample = train[i]
        assert sample["tokens"].shape == (S,) and sample["tokens"].dtype == torch.int64
        assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
        assert sample["loss_mask"].dtype == torch.float32 and sample["loss_mask"].min() == 1  # document ends too
        assert sample["position_ids"].tolist() == list(range(S))
        ends += int((sample["labels"] == tokenizer.eos_id).sum())
    assert ends > 0


def test_train_covers_its_part_once_and_shuffles_by_seed(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    def tokens(seed: int, cache: str) -> torch.Tensor:
        count = (len(stream_of(folder / "a")) - 1) // S
        train, _ = build(
            folder, tokenizer, tmp_path / cache, seed=seed, train_samples=count, split="1,0,0", valid_samples=0
        )
        return torch.stack([train[i]["labels"] for i in range(count)])

    one, again, other = tokens(7, "x"), tokens(7, "y"), tokens(8, "x")
    assert torch.equal(one, again) and not torch.equal(one, other)
    # one pass holds every token but the first of the stream and a rest that fills no sample
    missing = np.bincount(stream_of(folder / "a"), minlength=400) - np.bincount(one.flatten(), minlength=400)
    assert missing.min() >= 0 and missing.sum() <= S + 1


def test_no_document_is_in_train_and_valid(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    train, valid = build(folder, tokenizer, tmp_path, sources=[(folder / "b", 1.0)], train_samples=1, valid_samples=1)
    n_train, n_valid = ({int(i) for i in d.parts[0]._dataset.document_index} for d in (train, valid))
    assert n_train == set(range(80)) and n_valid == set(range(80, 100))


def test_blend_draws_in_proportion(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    sources = [(folder / "a", 3.0), (folder / "b", 1.0)]
    train, valid = build(folder, tokenizer, tmp_path, sources=sources, train_samples=200, valid_samples=8)
    assert len(train) == 200 and len(valid) == 8
    digits = {i for d in "01" for i in tokenizer.encode(d)}
    from_b = [float(np.mean([t in digits for t in train[i]["tokens"].tolist()])) > 0.3 for i in range(200)]
    assert sum(from_b) == 50
    assert all(abs(sum(from_b[:n]) - n / 4) <= 1 for n in range(200))  # not only in the sum: all the way


def test_many_small_parts_in_a_small_blend(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    sources = [(folder / "a", 20.0)] + [(folder / "b", 0.3)] * 9
    train, _ = build(folder, tokenizer, tmp_path, sources=sources, train_samples=220, valid_samples=0)
    assert len([train[i] for i in range(220)]) == 220


def test_cache_survives_a_killed_writer_and_follows_the_data(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", TEXTS * 10)
    prepare([source], tmp_path / "c", folder / "model")
    cache, sources = tmp_path / "cache", [(tmp_path / "c", 1.0)]
    first, _ = build(folder, tokenizer, cache, sources=sources)
    want = [first[i]["tokens"].tolist() for i in range(len(first))]
    arrays = sorted(cache.glob("*/*.npy"))
    assert arrays
    os.truncate(arrays[-1], arrays[-1].stat().st_size - 4)
    np.save(arrays[0], np.array([{"a": "pickle"}], dtype=object), allow_pickle=True)
    again, _ = build(folder, tokenizer, cache, sources=sources)
    assert [again[i]["tokens"].tolist() for i in range(len(again))] == want
    prepare([write_jsonl(source, [t * 3 for t in TEXTS] * 3)], tmp_path / "c", folder / "model", overwrite=True)
    build(folder, tokenizer, cache, sources=sources)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sources": []}, "data.train: empty"),
        ({"split": "99,1,x"}, r"data.split: .*, got '99,1,x'"),
        ({"split": "0,1,0"}, "leaves nothing to train on"),
        ({"split": "999,1,0"}, r"/a: the valid part of data.split '999,1,0' has 0 of 120 documents, 0 tokens"),
        (
            {"sequence_length": 10**6},
            r"/a: the train part .* has 96 of 120 documents, \d+ tokens; one sample takes 1000001",
        ),
    ],
)
def test_what_cannot_be_built(folder: Path, tokenizer: Tokenizer, tmp_path: Path, changed: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build(folder, tokenizer, tmp_path, **changed)
    assert "\n" not in str(error.value)


def test_weights_and_cache_folder_are_checked(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="weight"):
            build(folder, tokenizer, tmp_path, sources=[(folder / "a", weight)])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/samples-.*: cannot be written"):
        build(folder, tokenizer, tmp_path / "file")


@pytest.mark.parametrize(("given", "documents"), [(None, 120), ("3,1,0", 90)])
def test_with_a_target_valid_all_documents_train_unless_a_split_is_given(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, given: str | None, documents: int
) -> None:
    data = DataSection(split=given, target_valid="valid.jsonl")
    train, valid = build(folder, tokenizer, tmp_path, split=data.used_split, train_samples=10, valid_samples=0)
    assert valid is None and train.parts[0].documents == documents
    assert DataSection(split=given).used_split == (given or "99,1,0")


# ---- in order


def test_windows_predict_every_token_once(folder: Path, tokenizer: Tokenizer) -> None:
    valid, stream = build_valid(folder / "a", tokenizer, Settings(S)), stream_of(folder / "a")
    assert (len(stream) - 1) % S, "the last window should be a partial one"
    assert len(valid) == (len(stream) - 1) // S + 1
    tokens, labels = [], []
    for i in range(len(valid)):
        real = valid[i]["loss_mask"].bool()
        assert real.all() or i == len(valid) - 1
        tokens += valid[i]["tokens"][real].tolist()
        labels += valid[i]["labels"][real].tolist()
    assert tokens == stream[:-1] and labels == stream[1:]
    with pytest.raises(IndexError):
        valid[len(valid)]


def test_valid_of_another_tokenizer_or_cut_is_refused(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = load_tokenizer(make_hf_tokenizer(tmp_path / "other", vocab_size=290))
    with pytest.raises(UserError, match=r"a\.json: tokenized with another tokenizer"):
        build_valid(folder / "a", other, Settings(S))


# ---- batches


class Numbers:
    """Sample `i` is full of `i`."""

    def __init__(self, length: int, broken: int | None = None) -> None:
        self.length, self.broken = length, broken

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == self.broken:
            raise UserError("file.bin: offset 8: cannot be read")
        sample = {key: torch.full((2,), index) for key in ("tokens", "labels", "position_ids")}
        return {**sample, "loss_mask": torch.ones(2), "dataset_id": np.int16(1)}


def numbers(batches) -> list[list[int]]:
    return [b["tokens"][:, 0].tolist() for b in batches]


@pytest.mark.parametrize(("dp", "micro"), [(1, 1), (1, 4), (2, 2), (4, 1), (2, 1), (1, 8)])
@pytest.mark.parametrize("consumed", [0, 8, 24])
def test_a_global_batch_is_the_same_on_every_mesh(dp: int, micro: int, consumed: int) -> None:
    ranks = [
        numbers(iterate(Numbers(43), micro_batch_size=micro, dp_rank=r, dp_size=dp, consumed_samples=consumed))
        for r in range(dp)
    ]
    in_order = [i for step in zip(*ranks) for part in step for i in part]
    assert in_order == list(range(consumed, consumed + (43 - consumed) // (dp * micro) * dp * micro))
    steps = 8 // (dp * micro)
    for g in range((43 - consumed) // 8):  # global batches of 8
        got = {i for rank in ranks for part in rank[g * steps : (g + 1) * steps] for i in part}
        assert got == set(range(consumed + 8 * g, consumed + 8 * g + 8))


def test_resuming_goes_on_where_it_stopped() -> None:
    whole = numbers(iterate(Numbers(40), micro_batch_size=2, dp_rank=1, dp_size=2))
    rest = numbers(iterate(Numbers(40), micro_batch_size=2, dp_rank=1, dp_size=2, consumed_samples=12))
    assert rest == whole[3:] and whole[3] == [14, 15]


def test_padding_keeps_every_sample_and_adds_none_to_the_loss() -> None:
    for dp, micro in ((1, 4), (2, 2), (2, 1)):
        total, masked, steps = [], 0, set()
        for rank in range(dp):
            batches = list(iterate(Numbers(9), micro_batch_size=micro, dp_rank=rank, dp_size=dp, pad_to=4))
            steps.add(len(batches))
            for batch in batches:
                real = batch["loss_mask"][:, 0] == 1
                total += batch["tokens"][real, 0].tolist()
                masked += int((~real).sum())
        assert sorted(total) == list(range(9)) and masked == 3 and len(steps) == 1
    assert numbers(iterate(Numbers(9), micro_batch_size=2, stop=5)) == [[0, 1], [2, 3]]
    assert numbers(iterate(Numbers(9), micro_batch_size=2, consumed_samples=20, pad_to=4)) == []
    with pytest.raises(ValueError, match="must be a multiple"):
        iterate(Numbers(9), micro_batch_size=2, dp_size=2, pad_to=6)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_processes_change_nothing(folder: Path, tokenizer: Tokenizer, tmp_path: Path, workers: int) -> None:
    train, _ = build(folder, tokenizer, tmp_path, sources=[(folder / "a", 1.0), (folder / "b", 1.0)])
    state = torch.get_rng_state()
    batches = list(islice(iterate(train, micro_batch_size=4, consumed_samples=2, loader_workers=workers), 6))
    assert torch.equal(torch.get_rng_state(), state)  # the run's own random numbers are untouched
    assert set(batches[0]) == {"tokens", "labels", "loss_mask", "position_ids"}
    want = torch.stack([train[i]["tokens"] for i in range(2, 26)]).view(6, 4, S)
    assert torch.equal(torch.stack([b["tokens"] for b in batches]), want)


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def test_loader_processes_leave_signals_to_their_rank() -> None:
    born = []  # a loader process is signalled as soon as it is there, too
    os.register_at_fork(after_in_child=lambda: [os.kill(os.getpid(), number) for number in born])
    batches = iterate(Numbers(400), micro_batch_size=2, loader_workers=2)
    born.extend(SIGNALS)
    next(batches)
    born.clear()
    workers = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    for worker in workers:
        for number in 50 * SIGNALS:
            worker.send_signal(number)
    assert len(workers) >= 2 and len(numbers(batches)) == 199


class Handed(Numbers):
    """Writes where its loader process hands tensors over to `note`, once it does."""

    note: Path

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if (address := resource_sharer._resource_sharer._address) and not self.note.exists():
            part = self.note.with_suffix(".part")
            part.write_text(address)
            part.rename(self.note)
        return super().__getitem__(index)


def test_a_rank_that_goes_while_it_is_handed_a_batch_leaves_no_traceback(tmp_path, capfd) -> None:
    samples = Handed(40)
    samples.note = tmp_path / "address"
    batches = iterate(samples, micro_batch_size=2, loader_workers=1)
    for _ in range(8):
        next(batches)
    for _ in range(5):
        Client(samples.note.read_text(), authkey=current_process().authkey).close()
    assert len(numbers(batches)) == 12  # the thread served these after it
    assert capfd.readouterr().err == ""


class Broken:
    """A loader whose processes go while they hand over a batch; without any, which other tests would see."""

    num_workers = 1

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __iter__(self) -> Broken:
        return self

    def __next__(self) -> None:
        raise self.error


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "Connection reset by peer")])
def test_a_loader_process_that_goes_while_it_hands_over_a_batch_is_named(error) -> None:
    with pytest.raises(RuntimeError) as caught:
        next(_raise_errors(Broken(error)))
    line = lost_loader(caught.value)
    assert line.startswith("a data loader process was killed") and type(error).__name__ in line and "\n" not in line


def test_an_error_of_the_dataset_keeps_its_traceback() -> None:
    with pytest.raises(EOFError, match="Caught EOFError in DataLoader worker"):
        next(_raise_errors(Broken(EOFError("Caught EOFError in DataLoader worker process 0."))))


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_errors_stay_one_line(workers: int) -> None:
    batches = iterate(Numbers(20, broken=5), micro_batch_size=2, loader_workers=workers)
    assert numbers(islice(batches, 2)) == [[0, 1], [2, 3]]
    with pytest.raises(UserError, match=r"^file\.bin: offset 8: cannot be read$"):
        next(batches)
