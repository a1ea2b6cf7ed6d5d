"""The order of the training samples: epoch by epoch, so that it does not depend on how many samples a run asks for.

megatron-core's GPTDataset shuffles all epochs together, and the last one apart when it is short: another number of
samples gives another order from the first sample on. Here every epoch's documents are shuffled by (seed, epoch), samples
are cut from the stream of epochs, and the samples that end in one epoch are shuffled among themselves. A longer run
reads what the shorter one read, and continues.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from megatron.core.datasets import helpers

from megatron_ssu.engine.datasets import OrderedGPTDataset
from megatron_ssu.engine.ranks import is_rank_zero
from megatron_ssu.io.atomic import written_aside

PARTS = ("document_index", "sample_index", "shuffle_index")


class EpochwiseGPTDataset(OrderedGPTDataset):
    """GPTDataset in an order that any number of samples begins alike. Built on rank 0 first, then on the others."""

    def build_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.config.path_to_cache is None:
            return self._build()
        base = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}-epochs"
        files = [Path(self.config.path_to_cache) / f"{base}-{part}.npy" for part in PARTS]
        if not all(file.is_file() for file in files) and is_rank_zero():
            for file, array in zip(files, self._build(), strict=True):
                with written_aside(file) as part, part.open("wb") as out:
                    np.save(out, array, allow_pickle=False)
        documents, samples, order = (np.load(file, mmap_mode="r", allow_pickle=False) for file in files)
        return documents, samples, order

    def _build(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Document index int32 [epochs * documents], sample index [samples + 1, 2], shuffle index int64 [samples]."""
        length, extra = self.config.sequence_length, self.config.add_extra_token_to_sequence
        tokens = self.tokens_per_epoch()
        epochs = 1
        if self.num_samples is not None:
            epochs = max(1, -(-(self.num_samples * length + extra) // tokens))
        ends = [(epoch * tokens - extra) // length for epoch in range(1, epochs + 1)]
        documents = np.concatenate(
            [self._generator(0, epoch).permutation(self.indices) for epoch in range(epochs)], dtype=np.int32
        )
        samples = helpers.build_sample_idx(
            np.ascontiguousarray(self.dataset.sequence_lengths), documents, length, epochs, tokens, True, extra
        )
        starts = [0, *ends[:-1]]
        order = np.concatenate(
            [self._generator(1, e).permutation(np.arange(a, b)) for e, (a, b) in enumerate(zip(starts, ends))]
        )
        if len(order) != samples.shape[0] - 1:
            raise RuntimeError(f"{self.dataset_path}: {len(order)} samples in epochs, {samples.shape[0] - 1} in all")
        return documents, samples, order

    def _generator(self, purpose: int, epoch: int) -> np.random.RandomState:
        return np.random.RandomState([self.config.random_seed, purpose, epoch])
