"""The parts of the training data: samples of an indexed dataset, epoch after epoch, in an order that the seed alone decides."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_ssu.config.schema import DataSource
from megatron_ssu.data.gpt_dataset import EpochwiseGPTDataset
from megatron_ssu.data.indexed import MaskReader, PrefixInfo
from megatron_ssu.data.packing import Documents, Layout, best_fit, sample_of
from megatron_ssu.errors import UserError

log = logging.getLogger(__name__)


class Part(Protocol):
    """Samples of one indexed dataset. The samples of an epoch together hold each of its documents once."""

    documents: int  # per epoch
    tokens_per_epoch: int  # that are no padding
    samples_per_epoch: float

    def __getitem__(self, number: int) -> dict[str, Tensor]: ...

    def tokens(self, count: int) -> np.ndarray:
        """int64 [count]: tokens, without padding, of the first `count` samples."""

    def total_tokens(self, count: int) -> int:
        """The sum of `tokens(count)`."""

    def reserve(self, count: int) -> None:
        """The first `count` samples will be asked for. Collective."""


class StreamPart:
    """Documents joined, and cut every `sequence_length` tokens: megatron-core's GPTDataset in an order of epochs."""

    def __init__(
        self,
        info: PrefixInfo,
        documents: np.ndarray,
        length: int,
        build: Callable[[int], EpochwiseGPTDataset],
        *,
        isolated: bool,
    ) -> None:
        """`documents`: numbers of those in this part. `build(count)` makes the dataset of so many samples; collective.

        With `isolated` a position id of 0 begins every sample and every document in it.
        """
        self.documents, self._length, self._build = len(documents), length, build
        self.tokens_per_epoch = int(info.lengths[documents].sum(dtype=np.int64))
        self.samples_per_epoch = self.tokens_per_epoch / length
        self._masks = MaskReader(info) if info.masked else None
        self._ends = _Ends(info) if isolated else None
        self._dataset: EpochwiseGPTDataset | None = None

    def tokens(self, count: int) -> np.ndarray:
        return np.full(count, self._length, dtype=np.int64)

    def total_tokens(self, count: int) -> int:
        return count * self._length

    def reserve(self, count: int) -> None:
        self._dataset = self._build(count)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        assert self._dataset is not None, "reserve comes first"
        sample = dict(self._dataset[number])
        if self._masks is not None:
            mask = self._dataset.read_with(self._masks, number)[1:]
            sample["loss_mask"] = torch.from_numpy(mask.astype(np.float32))
        if self._ends is not None:
            starts = np.concatenate(([True], self._dataset.read_with(self._ends, number)[:-2] > 0))
            places = np.arange(self._length)
            sample["position_ids"] = torch.from_numpy(places - np.maximum.accumulate(np.where(starts, places, 0)))
        return sample


class _Ends:
    """Reads, in place of a document's tokens, which of them is its last."""

    def __init__(self, info: PrefixInfo) -> None:
        self._lengths = info.lengths

    def get(self, document: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        whole = int(self._lengths[document])
        count = whole - offset if length is None else int(length)
        return (np.arange(offset, offset + count) == whole - 1).astype(np.uint8)


@dataclass(frozen=True)
class _Rows:
    """Documents in rows: `documents` int64 [n], and where each row starts and the last one ends in it, int64 [rows + 1]."""

    documents: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, number: int) -> list[int]:
        found: list[int] = self.documents[self.starts[number] : self.starts[number + 1]].tolist()
        return found


class PackedPart:
    """Whole documents in rows: several by best fit, or one in each."""

    def __init__(
        self,
        info: PrefixInfo,
        documents: np.ndarray,
        layout: Layout,
        source: DataSource,
        vocab_size: int,
        seed: int,
    ) -> None:
        """`documents`: numbers of those in this part. Raises UserError as `fitting` does."""
        self._layout, self._seed = layout, seed
        self._documents = Documents(info, vocab_size, layout.length + 1)
        self._numbers = fitting(documents, self._documents, source)
        self._places = np.minimum(info.lengths[self._numbers], layout.length + 1).astype(np.int64) - 1
        self._alone = source.packing == "none"
        self.documents = len(self._numbers)
        self.tokens_per_epoch = int(self._places.sum())
        self._epochs: dict[int, _Rows] = {}  # the last two that were asked for
        self._sums: dict[int, np.ndarray] = {}  # tokens of the rows of an epoch
        self._rows = len(self._epoch(0))
        self.samples_per_epoch = float(self._rows)

    def reserve(self, count: int) -> None:
        pass

    def tokens(self, count: int) -> np.ndarray:
        epochs = max(1, -(-count // self._rows))
        return np.concatenate([self._tokens_of(epoch) for epoch in range(epochs)])[:count]

    def total_tokens(self, count: int) -> int:
        epochs, rest = divmod(count, self._rows)
        begun = int(self._tokens_of(epochs)[:rest].sum()) if rest else 0
        return epochs * self.tokens_per_epoch + begun

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        epoch, row = divmod(number, self._rows)
        found = [self._documents.get(int(self._numbers[i])) for i in self._epoch(epoch).row(row)]
        return sample_of(found, self._layout)

    def _tokens_of(self, epoch: int) -> np.ndarray:
        if epoch not in self._sums:
            rows = self._epoch(epoch)
            self._sums[epoch] = np.add.reduceat(self._places[rows.documents], rows.starts[:-1])
        return self._sums[epoch]

    def _epoch(self, epoch: int) -> _Rows:
        """The rows of an epoch, as numbers into `_numbers`."""
        if epoch not in self._epochs:
            self._epochs = dict([*self._epochs.items()][-1:])
            self._epochs[epoch] = self._packed(epoch)
        return self._epochs[epoch]

    def _packed(self, epoch: int) -> _Rows:
        order = self._generator(0, epoch).permutation(len(self._numbers))
        if self._alone:
            return _Rows(order, np.arange(len(order) + 1))
        rows = best_fit(self._places[order], self._layout.length)
        shuffled = [rows[row] for row in self._generator(1, epoch).permutation(len(rows))]
        return _Rows(order[np.concatenate(shuffled)], np.cumsum([0, *map(len, shuffled)]))

    def _generator(self, purpose: int, epoch: int) -> np.random.RandomState:
        return np.random.RandomState([self._seed, purpose, epoch])


def fitting(numbers: np.ndarray, documents: Documents, source: DataSource) -> np.ndarray:
    """The documents of `numbers` that are used: two tokens long or more, and not too long if those are dropped.

    One that is cut before the first token with loss is dropped, with a warning. Raises UserError where one is too long and is
    to be refused, or where none is left.
    """
    if not len(numbers):
        raise UserError(
            f"{source.path}: a part of data.split has none of its {documents.info.sequences} documents; give "
            "data.target_valid, or other fractions"
        )
    lengths, longest = documents.info.lengths[numbers], documents.longest
    advice = "raise data.sequence_length, or set data.too_long"
    long = numbers[lengths > longest]
    if len(long) and source.too_long == "refuse":
        raise UserError(
            f"{source.path}: document {int(long[0]) + 1} has {int(documents.info.lengths[long[0]])} tokens and a row holds "
            f"{longest}; {advice} to truncate or drop"
        )
    dropped = set(long.tolist()) if source.too_long == "drop" else _without_loss(long, documents)
    if dropped:
        why = "too long" if source.too_long == "drop" else "too long to hold any of their answers"
        log.warning("%s: %d of %d documents are %s and are left out", source.path, len(dropped), len(numbers), why)
    kept = numbers[(lengths > 1) & ~np.isin(numbers, sorted(dropped))]
    if not len(kept):
        raise UserError(f"{source.path}: none of its {len(numbers)} documents fits a row of {longest} tokens; {advice}")
    return kept


def _without_loss(long: np.ndarray, documents: Documents) -> set[int]:
    """Those of which the part that fits has no token with loss."""
    if not documents.info.masked:
        return set()
    found = set()
    for number in long.tolist():
        mask = documents.get(number)[1]
        if mask is not None and not mask[1:].any():
            found.add(number)
    return found
