"""megatron's GPTDataset with an order of samples of one's own."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset


class OrderedGPTDataset(GPTDataset):
    """GPTDataset whose indices a subclass makes, in `build_indices`."""

    def build_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Document index int32 [documents], sample index [samples + 1, 2], shuffle index int64 [samples]."""
        raise NotImplementedError

    def tokens_per_epoch(self) -> int:
        """Tokens in all documents of this part of the dataset."""
        return self._get_num_tokens_per_epoch()

    def read_with(self, reader: Any, index: int) -> np.ndarray:
        """int64 [sequence_length + 1]: what `reader.get(document, offset, length)` has of the tokens of a sample."""
        twin = copy.copy(self)
        twin.dataset = reader
        return twin._query_document_sample_shuffle_indices(index)[0]

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.build_indices()
