"""The length of a run: iterations, tokens or epochs."""

from __future__ import annotations

import pytest

from megatron_ssu.config.length import parse_tokens, with_epochs
from megatron_ssu.errors import UserError
from megatron_ssu.methods.registry import read_run

RUN = "model: {path: m}\ncheckpoint: {directory: d}\ndata: {sequence_length: 100}\n"


def read(tmp_path, train):
    (tmp_path / "run.yaml").write_text(f"{RUN}train: {{global_batch_size: 8, {train}}}\n")
    return read_run(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("train", "iterations"),
    [
        ("iterations: 7", 7),
        ("seed: 1", 1000),
        ("tokens: 8000", 10),
        ("tokens: 8001", 11),
        ("tokens: 200M", 250000),
        ("tokens: '1.5B'", 1875000),
        ("tokens: 8k, iterations: 10", 10),
        ("epochs: 2", -1),
    ],
)
def test_what_a_run_file_comes_to(tmp_path, train, iterations):
    assert read(tmp_path, train).train.iterations == iterations


@pytest.mark.parametrize(("samples", "iterations"), [(80.0, 10), (80.0000001, 10), (81.0, 11), (0.5, 1), (240.3, 31)])
def test_epochs_are_read_whole(tmp_path, samples, iterations):
    assert with_epochs(read(tmp_path, "epochs: 2"), samples).train.iterations == iterations


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("tokens: 8k, epochs: 2", r"train\.epochs: does not go with train\.tokens"),
        ("tokens: 8k, iterations: 9", r"train\.iterations: 9 does not go with train\.tokens: 8k, which is 10"),
        ("tokens: much", r"train\.tokens: must be a number such as 200M, .*, got 'much'"),
        ("tokens: 0", r"train\.tokens: must be a number .*, got 0"),
        ("epochs: 0", r"train\.epochs: must be above 0, got 0"),
    ],
)
def test_lengths_that_do_not_agree_are_refused(tmp_path, train, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, train)
    with pytest.raises(UserError, match=r"train\.iterations: 9 does not go with train\.epochs: 2\.0, which is 10"):
        with_epochs(read(tmp_path, "epochs: 2, iterations: 9"), 80)


def test_tokens_are_read_in_units():
    assert [parse_tokens(text) for text in ("1k", "2M", "0.5B", "1T", 12)] == [1000, 2 * 10**6, 5 * 10**8, 10**12, 12]
