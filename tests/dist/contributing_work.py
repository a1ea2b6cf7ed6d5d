"""What the rank of the test of docs/extending.md does: its examples, loaded as new files and added to their lists."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_ssu.methods import registry as methods
from megatron_ssu.methods.scored import make_scores
from megatron_ssu.models import families
from megatron_ssu.models.parallel_model import open_model
from megatron_ssu.scoring import registry as scores
from tests.dist import methods_work, work


def loaded(name: str, code: str) -> types.ModuleType:
    """The module `name` out of its text."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(code, name, "exec"), module.__dict__)
    return module


@contextmanager
def added(blocks: dict[str, str]) -> Iterator[None]:
    """Within it the three lists have the line that docs/extending.md names."""
    modules = {path: loaded(path.removesuffix(".py").replace("/", "."), code) for path, code in blocks.items()}
    by_file = {Path(path).stem: module for path, module in modules.items()}
    with (
        mock.patch.dict(scores.SCORES, {"energy": by_file["energy"].ENERGY}),
        mock.patch.object(methods, "METHODS", (*methods.METHODS, by_file["norms"].NormTuning)),
        mock.patch.object(families, "FAMILIES", (*families.FAMILIES, by_file["seed_oss"].SEED_OSS)),
    ):
        yield


def logits(blocks: dict[str, str], model: str, ids: torch.Tensor) -> torch.Tensor | None:
    with added(blocks):
        return work.logits(model, work.mesh(), ids)


def method_run(blocks: dict[str, str], file: str, folder: str, overrides: list[str], name: str) -> Any:
    with added(blocks):
        return methods_work.cycle(file, folder, overrides, name)


def score(blocks: dict[str, str], file: str, overrides: list[str]) -> dict[str, Any]:
    """Column and row scores by the new name, as numpy arrays."""
    with added(blocks):
        found = make_scores(open_model(methods.read_run(file, overrides)))
        assert found is not None
        return {key: value for key, value in found.tensors.items() if key.startswith(("energy/", "input_norm/"))}
