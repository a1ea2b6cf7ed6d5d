"""What the ranks of the FP8 state tests do: layers that look like Transformer Engine's under delayed scaling, on CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state

from megatron_ssu.methods.base import Method
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.parallel_model import ParallelModel, open_model
from megatron_ssu.shield.shield_file import Shield
from megatron_ssu.train import sharded_state as state
from megatron_ssu.train.checkpoints import Checkpoints, Progress
from megatron_ssu.train.identity import Identity
from megatron_ssu.train.optimizer_state import OptimizerState
from megatron_ssu.train.trainer import Trainer
from tests.dist import resume_work

LINEAR = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def _open(model: str, parallel: dict[str, Any], directory: str) -> tuple[ParallelModel, OptimizerState]:
    session = open_model(resume_work.make_run(model, parallel, directory, "bf16"))
    empty = Shield("none", "m", model_fingerprint(model), matrices={}, masks={})
    return session, Trainer(session, empty).optimizer_state


def _pretend(session: ParallelModel) -> dict[str, Any]:
    """Give every linear layer what Transformer Engine's has; the modules by the layers' numbers in the whole model."""
    session.config.fp8, session.config.fp8_recipe = "hybrid", "delayed"
    found = {}
    for layer in session.chunks[0].decoder.layers:
        for name in LINEAR:
            module = layer.get_submodule(name)
            module.fp8_meta = {"fp8_checkpoint": False}
            module.started = 0
            module.init_fp8_meta_tensors = lambda recipe, module=module: _start(module, recipe)
            found[f"{layer.layer_number - 1}.{name}"] = module
    return found


def _start(module: Any, recipe: Any) -> None:
    module.started += 1
    for key, tensors in (("scaling_fwd", 3), ("scaling_bwd", 2)):
        count = tensors * module.fp8_meta["num_gemms"]
        history = torch.zeros(recipe.amax_history_len, count)
        module.fp8_meta[key] = SimpleNamespace(scale=torch.ones(count), amax_history=history)


def _values(modules: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        f"{name} {key} {part}": getattr(module.fp8_meta[key], part).clone()
        for name, module in modules.items()
        for key in ("scaling_fwd", "scaling_bwd")
        if key in module.fp8_meta
        for part in ("scale", "amax_history")
    }


def save(model: str, parallel: dict[str, Any], directory: str, history: int) -> dict[str, torch.Tensor]:
    """A checkpoint of made-up state: alike on the ranks of a stage, but for what each has noted since the last reduction."""
    session, optimizer = _open(model, parallel, directory)
    rank = parallel_state.get_tensor_model_parallel_rank()
    modules = _pretend(session)
    for name, module in modules.items():
        module.fp8_meta["num_gemms"] = 1
        _start(module, SimpleNamespace(amax_history_len=history))
        generator = torch.Generator().manual_seed(sum(name.encode()))
        for key in ("scaling_fwd", "scaling_bwd"):
            meta = module.fp8_meta[key]
            meta.scale.copy_(torch.rand(meta.scale.shape, generator=generator) * 1000 + 1)
            meta.amax_history.copy_(torch.rand(meta.amax_history.shape, generator=generator))
            meta.amax_history[0] += rank
    Checkpoints(directory).save(session, Progress(iteration=1), Identity({}), optimizer, Method())
    return _values(modules)


def load(
    model: str, parallel: dict[str, Any], directory: str, history: int, *, fp8: bool = True
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """What a new run resumes with, and how often each of its layers was made ready."""
    session, optimizer = _open(model, parallel, directory)
    modules = _pretend(session) if fp8 else {}
    recipe = SimpleNamespace(amax_history_len=history)

    def recipe_of(config: Any) -> SimpleNamespace:
        if not config.fp8:
            raise ValueError("what megatron-core raises beside Transformer Engine")
        return recipe

    with mock.patch.object(state, "get_fp8_recipe", recipe_of):
        Checkpoints(directory).load(1, session, Identity({}), optimizer, Method())
    assert all(module.fp8_meta["recipe"] is recipe for module in modules.values() if module.started)
    return _values(modules), [module.started for module in modules.values()]


def save_without(model: str, parallel: dict[str, Any], directory: str) -> list[str]:
    """A checkpoint of layers without FP8 state; the keys of its model."""
    session, optimizer = _open(model, parallel, directory)
    assert any(key.endswith("_extra_state") for key in session.chunks[0].sharded_state_dict())
    Checkpoints(directory).save(session, Progress(iteration=1), Identity({}), optimizer, Method())
    return list(state.model_state(session)["model"])
