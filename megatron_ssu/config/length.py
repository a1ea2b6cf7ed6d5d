"""How long a run is: train.iterations, or the iterations that train.tokens and train.epochs come to."""

from __future__ import annotations

import math
import re
from dataclasses import replace

from megatron_ssu.config.coerce import show
from megatron_ssu.config.schema import RunConfig
from megatron_ssu.errors import UserError

UNSET, DEFAULT = -1, 1000
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def with_iterations(run: RunConfig) -> RunConfig:
    """The run file with train.iterations, unless train.epochs decides it, which takes the data: see `with_epochs`.

    Raises UserError where two of them are given that do not agree.
    """
    train = run.train
    if train.tokens is not None and train.epochs is not None:
        raise UserError("train.epochs: does not go with train.tokens; leave one of them out")
    if train.epochs is not None and not 0 < train.epochs < math.inf:
        raise UserError(f"train.epochs: must be above 0, got {train.epochs}")
    if train.tokens is not None:
        step = max(1, train.global_batch_size) * max(1, run.data.sequence_length)
        return _agreed(run, math.ceil(parse_tokens(train.tokens) / step), f"train.tokens: {train.tokens}")
    if train.iterations == UNSET and train.epochs is None:
        return replace(run, train=replace(train, iterations=DEFAULT))
    return run


def with_epochs(run: RunConfig, samples: float) -> RunConfig:
    """The run file with the iterations that read so many `samples`, those of train.epochs, and no fewer."""
    iterations = math.ceil(round(samples / run.train.global_batch_size, 6))
    return _agreed(run, max(1, iterations), f"train.epochs: {run.train.epochs}")


def parse_tokens(tokens: str | int) -> int:
    """Tokens of 200000, '200M', '1.5B'; K, M, B, T count by 1000. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMBT]?)", str(tokens).strip().upper())
    found = round(float(match[1]) * _UNITS[match[2]]) if match and not isinstance(tokens, bool) else 0
    if found < 1:
        raise UserError(f"train.tokens: must be a number such as 200M, 1.5B or 50000, got {show(tokens)}")
    return found


def _agreed(run: RunConfig, iterations: int, what: str) -> RunConfig:
    given = run.train.iterations
    if given not in (UNSET, iterations):
        raise UserError(
            f"train.iterations: {given} does not go with {what}, which is {iterations}; leave one of them out"
        )
    return replace(run, train=replace(run.train, iterations=iterations))
