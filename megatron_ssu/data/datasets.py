"""Training and validation samples from indexed datasets, through megatron-core's GPTDataset and blends.

A sample is a dict of `tokens`, `labels`, `position_ids` (int64 [s]) and `loss_mask` (float32 [s]).
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType
from torch.utils.data import Dataset

from megatron_ssu.config.units import parse_split
from megatron_ssu.data.gpt_dataset import EpochwiseGPTDataset
from megatron_ssu.data.indexed import CheckedIndexedDataset, CheckedReader, PrefixInfo, bin_path, check_prefix
from megatron_ssu.data.loader import iterate
from megatron_ssu.data.tokenizer import Tokenizer
from megatron_ssu.engine.ranks import on_rank_zero
from megatron_ssu.errors import UserError, one_line

__all__ = ["WindowDataset", "build_train_valid", "build_valid", "iterate"]


class _TokenizerFacts:
    """The little that GPTDatasetConfig wants of a tokenizer. It has no `pad`: nothing in a document is padding."""

    def __init__(self, eod: int, vocab_size: int, digest: str) -> None:
        self.eod = eod
        self.vocab_size = vocab_size
        self.unique_identifiers = OrderedDict(digest=digest)


class _CheckedGPTDataset(EpochwiseGPTDataset):
    """GPTDataset whose reads name file and offset when they fail."""

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> CheckedIndexedDataset:
        return CheckedIndexedDataset(dataset_path, config.tokenizer.vocab_size)


class _Builder(BlendedMegatronDatasetBuilder):
    """The blend's builder, also without torch.distributed: BlendedDataset asks for a rank before it caches."""

    @staticmethod
    def build_generic_dataset(cls: Any, is_built_on_rank: Callable, synchronize_ranks: bool, *args: Any) -> Any:
        if cls is BlendedDataset and not torch.distributed.is_initialized():
            config = copy.copy(args[-1])
            config.path_to_cache = None
            args = (*args[:-1], config)
        return BlendedMegatronDatasetBuilder.build_generic_dataset(cls, is_built_on_rank, synchronize_ranks, *args)


def build_train_valid(
    sources: Sequence[tuple[str | Path, float]],
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    split: str,
    seed: int,
    train_samples: int,
    valid_samples: int,
    cache_dir: str | Path,
    vocab_size: int | None = None,
) -> tuple[Dataset, Dataset | None]:
    """The train samples and, with `valid_samples` > 0, the valid samples of a blend of (prefix, weight).

    Documents are divided by `split`, shuffled by `seed` and repeated as often as `train_samples` asks; a sample may
    span documents. More `train_samples` begin with the same samples in the same order.
    Call it on all ranks: rank 0 builds the sample indices under `cache_dir`, the others read them.
    Ids of at least `vocab_size` (default: the tokenizer's) end the run when read.
    Raises UserError for damaged or too small datasets, wrong weights or fractions, a `cache_dir` that cannot be written.
    """
    if not sources:
        raise UserError("data.train: empty; name at least one JSONL file or indexed dataset")
    if train_samples < 1:
        raise UserError(
            f"train samples: {train_samples}; train.iterations and train.global_batch_size must be positive"
        )
    for path, weight in sources:
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"data.train: weight {weight} of {path}; weights are above 0")
    shares = parse_split(split)
    infos = [check_prefix(path, tokenizer=tokenizer) for path, _ in sources]
    for info in infos:
        _check_size(info, split, shares, sequence_length, with_valid=valid_samples > 0)
    facts = _TokenizerFacts(tokenizer.document_end, vocab_size or tokenizer.vocab_size, tokenizer.digest)
    weights = None if len(sources) == 1 else [float(w) for _, w in sources]
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend=([str(path) for path, _ in sources], weights),
        split=split,
        path_to_cache=str(_cache_folder(Path(cache_dir), infos)),
        tokenizer=facts,
        # megatron asks every part for its fraction, rounded up: for few samples of many parts less than it draws
        mid_level_dataset_surplus=max(0.005, 2 * (len(sources) + 1) / train_samples),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train_share, valid_share, _ = config.split_matrix
    # Parts that nobody reads are not built: megatron loops forever over a part without documents.
    config.split_matrix = [train_share, valid_share if valid_samples > 0 else None, None]
    train, valid, _ = _Builder(_CheckedGPTDataset, [train_samples, valid_samples, 0], lambda: True, config).build()
    return train, valid


def _check_size(
    info: PrefixInfo, split: str, shares: tuple[float, float, float], sequence_length: int, *, with_valid: bool
) -> None:
    """Both parts in use must hold one sample; otherwise megatron repeats documents within a sample or loops forever."""
    index = CheckedIndexedDataset(str(info.prefix), vocab_size=1 << 62).index
    n = info.sequences
    first = round(shares[0] * n)
    parts = [("train", 0, first)] + ([("valid", first, round((shares[0] + shares[1]) * n))] if with_valid else [])
    for name, begin, end in parts:
        tokens = int(index.sequence_lengths[begin:end].sum(dtype=np.int64))
        if tokens < sequence_length + 1:
            advice = "" if name == "train" else "data.target_valid, a larger valid fraction, "
            raise UserError(
                f"{info.prefix}: the {name} part of data.split '{split}' has {end - begin} of {n} documents, "
                f"{tokens} tokens; one sample takes {sequence_length + 1}: give {advice}more text or "
                "a smaller data.sequence_length"
            )


def _cache_folder(cache_dir: Path, infos: list[PrefixInfo]) -> Path:
    """The folder of these datasets' sample indices, rid of half-written ones; collective."""
    key = hashlib.sha256("\n".join(info.index_digest for info in infos).encode()).hexdigest()[:12]
    folder = cache_dir / f"samples-{key}"

    def clean() -> None:
        try:
            _clean_cache(folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror or one_line(error)})") from error

    on_rank_zero(clean)
    return folder


def _clean_cache(folder: Path) -> None:
    """Remove arrays that a killed process left unfinished (megatron writes them in place) and any with pickles."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".writable"
    probe.touch()
    probe.unlink()
    for file in folder.glob("*.npy"):
        try:
            np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError):
            file.unlink()


@dataclass
class WindowDataset(Dataset):
    """A whole indexed dataset in order: window `i` predicts tokens `i*s+1 ... (i+1)*s` of the stream, ends included.

    No token is predicted twice, and of all only the first is not; the last window is padded, the padding's loss masked.
    """

    info: PrefixInfo
    sequence_length: int
    vocab_size: int
    padding: int

    def __post_init__(self) -> None:
        self._reader = CheckedReader(bin_path(self.info.prefix), self.vocab_size)

    def __len__(self) -> int:
        return -(-(self.info.tokens - 1) // self.sequence_length)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        length, start = self.sequence_length, index * self.sequence_length
        if not 0 <= index < len(self):
            raise IndexError(index)
        count = min(length + 1, self.info.tokens - start)
        stream = self._reader.read(self.info.dtype, count, start * DType.size(self.info.dtype)).astype(np.int64)
        tokens, labels = np.full(length, self.padding), np.full(length, self.padding)
        tokens[: count - 1], labels[: count - 1] = stream[:-1], stream[1:]
        loss_mask = torch.zeros(length)
        loss_mask[: count - 1] = 1.0
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "loss_mask": loss_mask,
            "position_ids": torch.arange(length),
        }

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_reader"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()


def build_valid(
    prefix: str | Path, tokenizer: Tokenizer, *, sequence_length: int, vocab_size: int | None = None
) -> WindowDataset:
    """All of an indexed dataset as windows in order, unshuffled: the same samples in every run and on every mesh.

    Raises UserError for a damaged dataset, one made with another tokenizer, or one with less than two tokens.
    """
    info = check_prefix(prefix, tokenizer=tokenizer)
    if info.tokens < 2:
        raise UserError(f"{prefix}: {info.tokens} token; a validation set needs at least 2")
    return WindowDataset(info, sequence_length, vocab_size or tokenizer.vocab_size, tokenizer.eos_id or 0)
