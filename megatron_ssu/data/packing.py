"""Whole documents in rows of a fixed length: which go together, and what a row is as a sample.

A document of n tokens takes n - 1 places of a row: its last token is predicted and predicts nothing. Rows are padded; padding
has no loss, and counts as a document of its own.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron_ssu.data.indexed import CheckedReader, MaskReader, PrefixInfo, bin_path

Read = Callable[[int, int], np.ndarray]  # document, its tokens from the first on -> an array of that many


def best_fit(places: np.ndarray, length: int) -> list[list[int]]:
    """Numbers of documents that take so many `places` int [n], by row: longest first, each in the fullest row that it fits in.

    Of equal ones the earlier comes first, so an order of documents decides which of them go together, and not how many rows
    there are. O(n log(length)).
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # free places -> rows
    free: list[int] = []  # the keys of `open_rows`, ascending
    for number in np.argsort(-places, kind="stable").tolist():
        need = int(places[number])
        at = bisect_left(free, need)
        if at == len(free):
            row, left = len(rows), length
            rows.append([])
        else:
            left = free[at]
            row = open_rows[left].pop()
            if not open_rows[left]:
                del open_rows[left]
                free.pop(at)
        rows[row].append(number)
        left -= need
        if left > 0:
            if left not in open_rows:
                open_rows[left] = []
                insort(free, left)
            open_rows[left].append(row)
    return rows


@dataclass(frozen=True)
class Layout:
    """How a row becomes a sample."""

    length: int  # places
    padding: int  # token
    isolated: bool  # position ids restart at every document


def sample_of(documents: Sequence[tuple[np.ndarray, np.ndarray | None]], layout: Layout) -> dict[str, torch.Tensor]:
    """tokens, labels, position_ids int64 [length] and loss_mask float32 [length] of (tokens, mask or None) in a row."""
    tokens, labels = np.full(layout.length, layout.padding), np.full(layout.length, layout.padding)
    mask, positions = np.zeros(layout.length, np.float32), np.arange(layout.length)
    at = 0
    for ids, loss in documents:
        end = at + len(ids) - 1
        tokens[at:end], labels[at:end] = ids[:-1], ids[1:]
        mask[at:end] = 1.0 if loss is None else loss[1:]
        if layout.isolated:
            positions[at:end] = np.arange(end - at)
        at = end
    if layout.isolated:
        positions[at:] = np.arange(layout.length - at)
    arrays = {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions}
    return {key: torch.from_numpy(value) for key, value in arrays.items()}


class Documents:
    """Reads documents of an indexed dataset, cut to `longest` tokens, with their masks."""

    def __init__(self, info: PrefixInfo, vocab_size: int, longest: int) -> None:
        self.info, self.vocab_size, self.longest = info, vocab_size, longest
        self._starts = np.cumsum(info.lengths, dtype=np.int64) - info.lengths
        self._open()

    def _open(self) -> None:
        self._reader = CheckedReader(bin_path(self.info.prefix), self.vocab_size)
        self._masks = MaskReader(self.info) if self.info.masked else None

    def get(self, document: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens int64 [n], and uint8 [n]: 1 where there is loss; None: everywhere."""
        count = min(int(self.info.lengths[document]), self.longest)
        offset = int(self._starts[document]) * np.dtype(self.info.dtype).itemsize
        tokens = self._reader.read(self.info.dtype, count, offset).astype(np.int64)
        return tokens, None if self._masks is None else self._masks.get(document, 0, count)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_reader", "_masks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


class RowDataset(Dataset):
    """Rows of documents as samples, in the order of the rows."""

    def __init__(self, documents: Documents, rows: Sequence[Sequence[int]], layout: Layout) -> None:
        self._documents, self._rows, self._layout = documents, rows, layout

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return sample_of([self._documents.get(int(number)) for number in self._rows[index]], self._layout)
