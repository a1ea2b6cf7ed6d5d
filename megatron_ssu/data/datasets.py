"""Training and validation samples from indexed datasets: parts, in a blend, and whole datasets in order.

A sample is a dict of `tokens`, `labels`, `position_ids` (int64 [s]) and `loss_mask` (float32 [s]).
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from megatron_ssu.config.schema import DataSource, Ramp
from megatron_ssu.config.sources import is_weight
from megatron_ssu.config.units import parse_split
from megatron_ssu.data.blend import Blend, Era, Share, continued
from megatron_ssu.data.gpt_dataset import EpochwiseGPTDataset
from megatron_ssu.data.indexed import (
    CheckedIndexedDataset,
    CheckedReader,
    PrefixInfo,
    bin_path,
    check_prefix,
    content_digest,
    loss_path,
)
from megatron_ssu.data.packing import Documents, Layout, RowDataset, best_fit
from megatron_ssu.data.parts import PackedPart, Part, StreamPart, fitting
from megatron_ssu.data.tokenizer import Tokenizer
from megatron_ssu.engine.ranks import on_rank_zero
from megatron_ssu.errors import UserError, one_line

Sources = Sequence[tuple[str | Path, DataSource]]  # prefixes of indexed datasets, with what the run file says of them


class _TokenizerFacts:
    """The little that GPTDatasetConfig wants of a tokenizer. It has no `pad`: nothing in a document is padding."""

    def __init__(self, eod: int, vocab_size: int, digest: str) -> None:
        self.eod = eod
        self.vocab_size = vocab_size
        self.unique_identifiers = OrderedDict(digest=digest)


@dataclass(frozen=True)
class Settings:
    """What all parts of a run have in common."""

    sequence_length: int
    split: str = "1,0,0"
    seed: int = 1234
    isolated: bool = False  # documents do not attend to each other
    weights_in: str = "samples"
    vocab_size: int | None = None  # ids from it on end the run when they are read; None: the tokenizer's
    replayed: int = 0  # how many sources, the last ones, are replay
    replay: float | Ramp = 0.0  # fraction of the blend that they are together


class Parts:
    """The parts of a run's sources, for training and for validation, and the blends of them.

    Call it on all ranks: rank 0 builds sample indices under `cache_dir`, the others read them. Raises UserError for damaged or
    too small datasets, wrong weights or fractions, a `cache_dir` that cannot be written.
    """

    def __init__(
        self, sources: Sources, tokenizer: Tokenizer, settings: Settings, cache_dir: str | Path, *, with_valid: bool
    ) -> None:
        if not sources:
            raise UserError("data.train: empty; name at least one JSONL file or indexed dataset")
        for path, source in sources:
            if not is_weight(source.weight):
                raise UserError(f"data.train: weight {source.weight} of {path}; weights are above 0")
        self._settings, self._tokenizer = settings, tokenizer
        self._vocab = settings.vocab_size or tokenizer.vocab_size
        self._fractions = parse_split(settings.split)
        self._infos = [check_prefix(path, tokenizer=tokenizer) for path, _ in sources]
        self._sources = [source for _, source in sources]
        for info, source in zip(self._infos, self._sources, strict=True):
            if source.packing == "stream":
                _check_size(info, settings.split, self._fractions, settings.sequence_length, with_valid=with_valid)
        self._cache = _cache_folder(Path(cache_dir), self._infos)
        keys = [content_digest(path)[:16] for path, _ in sources]
        self.shares = [
            Share(
                _key(keys[: n + 1], source),
                source.path,
                source.weight,
                settings.replay if n >= len(sources) - settings.replayed else None,
            )
            for n, source in enumerate(self._sources)
        ]
        self.train = [self._part(*pair, Split.train) for pair in zip(self._infos, self._sources, strict=True)]

    def samples_in(self, epochs: float) -> float:
        """Samples of a run of so many epochs: what all sources hold, each as often as its weight where weights count epochs.

        Replay comes on top.
        """
        settings = self._settings
        own = len(self.train) - settings.replayed
        factors = [1.0] * own
        if settings.weights_in == "epochs":
            factors = [_mean(source.weight) for source in self._sources[:own]]
        parts = list(zip(factors, self.train[:own], strict=True))
        samples = sum(factor * part.samples_per_epoch for factor, part in parts)
        if not settings.replayed:
            return epochs * samples
        beside = _mean(settings.replay) / (1 - _mean(settings.replay))  # replay for one of the rest
        if settings.weights_in == "samples":
            return epochs * samples * (1 + beside)
        tokens = sum(factor * part.tokens_per_epoch for factor, part in parts)
        return epochs * (samples + tokens * beside / self._tokens_per_replayed())

    def _tokens_per_replayed(self) -> float:
        """Mean tokens of a sample of replay."""
        own = len(self.train) - self._settings.replayed
        parts = self.train[own:]
        tokens = np.array([_mean(source.weight) for source in self._sources[own:]])
        if self._settings.weights_in == "epochs":
            tokens = tokens * np.array([part.tokens_per_epoch for part in parts])
        per_sample = np.array([part.tokens_per_epoch / part.samples_per_epoch for part in parts])
        return float(tokens.sum() / (tokens / per_sample).sum())

    def blend(
        self, samples: int, *, reach: int = 0, saved: dict[str, Any] | None = None, at: int = 0
    ) -> tuple[Blend, str]:
        """The training samples of a run of so many, and what changed since the blend `saved` after its sample `at`."""
        era, change = continued(saved, self.shares, self._settings.weights_in, samples, at)
        return Blend(self.train, self.shares, self._settings.weights_in, samples, era=era, reach=reach), change

    def valid(self, samples: int) -> Blend:
        """So many samples of the documents that data.split keeps for validation, in the blend of the run's beginning."""
        parts = [self._part(*pair, Split.valid) for pair in zip(self._infos, self._sources, strict=True)]
        return Blend(parts, self.shares, self._settings.weights_in, samples, era=Era())

    def _part(self, info: PrefixInfo, source: DataSource, split: Split) -> Part:
        settings = self._settings
        first, last = (round(sum(self._fractions[:n]) * info.sequences) for n in (split.value, split.value + 1))
        documents = np.arange(first, last)
        if source.packing != "stream":
            layout = Layout(settings.sequence_length, self._tokenizer.eos_id or 0, settings.isolated)
            return PackedPart(info, documents, layout, source, self._vocab, settings.seed)
        return StreamPart(
            info,
            documents,
            settings.sequence_length,
            lambda count: self._stream(info, documents, split, count),
            isolated=settings.isolated,
        )

    def _stream(self, info: PrefixInfo, documents: np.ndarray, split: Split, count: int) -> EpochwiseGPTDataset:
        settings, tokenizer = self._settings, self._tokenizer
        config = GPTDatasetConfig(
            random_seed=settings.seed,
            sequence_length=settings.sequence_length,
            blend=([str(info.prefix)], None),
            split=settings.split,
            path_to_cache=str(self._cache),
            tokenizer=_TokenizerFacts(tokenizer.document_end, self._vocab, tokenizer.digest),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )

        def build() -> EpochwiseGPTDataset:
            low = CheckedIndexedDataset(str(info.prefix), self._vocab)
            return EpochwiseGPTDataset(low, str(info.prefix), documents.astype(np.int32), count, split, config)

        on_rank_zero(lambda: build() and None)  # which writes the indices
        return build()


def _key(digests: Sequence[str], source: DataSource) -> str:
    """What identifies the last of these sources: its documents, how they are packed, and of equal ones which it is."""
    number = Counter(digests)[digests[-1]]
    how = "" if source.packing == "stream" else f" {source.packing} {source.too_long}"
    return digests[-1] + how + (f" #{number}" if number > 1 else "")


def _mean(weight: float | Ramp) -> float:
    """A weight over the run."""
    return weight if isinstance(weight, float | int) else (weight.start + weight.end) / 2


def _check_size(
    info: PrefixInfo, split: str, shares: tuple[float, float, float], sequence_length: int, *, with_valid: bool
) -> None:
    """Both parts in use must hold one sample; otherwise megatron repeats documents within a sample or loops forever."""
    n = info.sequences
    first = round(shares[0] * n)
    parts = [("train", 0, first)] + ([("valid", first, round((shares[0] + shares[1]) * n))] if with_valid else [])
    for name, begin, end in parts:
        tokens = int(info.lengths[begin:end].sum(dtype=np.int64))
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
        self._masks = CheckedReader(loss_path(self.info.prefix), 2) if self.info.masked else None

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
        if self._masks is not None:
            found = self._masks.read(np.uint8, count - 1, start + 1)
            loss_mask[: count - 1] = torch.from_numpy(found.astype(np.float32))
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "loss_mask": loss_mask,
            "position_ids": torch.arange(length),
        }

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_reader", "_masks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()


def build_valid(
    prefix: str | Path, tokenizer: Tokenizer, settings: Settings, source: DataSource | None = None
) -> Dataset:
    """All of an indexed dataset in order, unshuffled: the same samples in every run and on every mesh.

    As windows over its joined documents; where `source` packs otherwise, as rows of whole documents. Raises UserError for a
    damaged dataset, one made with another tokenizer, or one with less than two tokens.
    """
    info = check_prefix(prefix, tokenizer=tokenizer)
    if info.tokens < 2:
        raise UserError(f"{prefix}: {info.tokens} token; a validation set needs at least 2")
    vocab, padding = settings.vocab_size or tokenizer.vocab_size, tokenizer.eos_id or 0
    length = settings.sequence_length
    if source is None or source.packing == "stream":
        return WindowDataset(info, length, vocab, padding)
    documents = Documents(info, vocab, length + 1)
    numbers = fitting(np.arange(info.sequences), documents, replace(source, too_long="truncate"))
    places = np.minimum(info.lengths[numbers], length + 1).astype(np.int64) - 1
    rows = best_fit(places, length) if source.packing == "documents" else [[i] for i in range(len(numbers))]
    return RowDataset(
        documents, [[int(numbers[i]) for i in row] for row in rows], Layout(length, padding, settings.isolated)
    )
