"""What the ranks of the tests of drift do."""

from __future__ import annotations

from typing import Any

import torch

from megatron_ssu.config.schema import TrainSection
from megatron_ssu.data.calibration import Calibration
from megatron_ssu.drift.hidden import compare_hidden
from megatron_ssu.models.source import open_source
from tests.dist import work


def hidden(
    models: list[str], parallel: dict[str, Any], tokens: torch.Tensor, mask: torch.Tensor
) -> list[dict[str, Any]]:
    """Drift of the further models against the first, on rows of tokens."""
    run = work.run_config(models[0], parallel, train=TrainSection(micro_batch_size=2, global_batch_size=2))
    sources = [open_source(model) for model in models]
    text = Calibration(tokens, mask, "digest", len(tokens), None)
    return [found.to_dict() for found in compare_hidden(run, sources[0], sources[1:], text)]
