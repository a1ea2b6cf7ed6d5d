"""What train.regularize refuses, what of it must stay on resume, and the run file of the source's copy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_ssu.config.schema import CheckpointSection, ModelSection, ParallelSection, PrecisionSection, RunConfig
from megatron_ssu.config.schema import RegularizeSection as Section
from megatron_ssu.errors import UserError
from megatron_ssu.methods.base import Method
from megatron_ssu.train import regularizers
from megatron_ssu.train.identity import Identity, regularize_facts
from megatron_ssu.train.regularizers import check_regularizers, forward_run


class Adapters(Method):
    name = "lora"
    adapts = True


def test_l2_does_not_go_with_adapters():
    with pytest.raises(UserError) as caught:
        check_regularizers(Section(l2=0.1), Adapters())
    message = str(caught.value)
    assert "\n" not in message
    assert all(words in message for words in ("train.regularize.l2", "0.1", "lora", "train.optimizer.weight_decay"))
    check_regularizers(Section(kl=0.1), Adapters())
    check_regularizers(Section(l2=0.1), Method())


def test_what_is_left_out_is_no_fact():
    assert regularize_facts(Section(kl_temperature=2.0)) == {}
    assert regularize_facts(Section(l2=0.5, kl_temperature=2.0)) == {"l2": 0.5}
    assert regularize_facts(Section(kl=0.5)) == {"kl": 0.5, "kl_temperature": 1.0}


def test_it_may_not_change_on_resume():
    now = Identity({"train.regularize.kl": 0.5})
    with pytest.raises(UserError, match=r"train\.regularize\.kl was not set in this checkpoint and is 0\.5 now"):
        now.compare({}, Path("checkpoint"))


def test_the_copy_is_only_run_forward():
    run = RunConfig(
        model=ModelSection(
            path="model",
            transformer={"recompute_granularity": "full", "attention_backend": "auto", "cuda_graph_impl": 1},
        ),
        checkpoint=CheckpointSection(directory="run"),
        parallel=ParallelSection(
            transformer={"tensor_model_parallel_size": 2, "defer_embedding_wgrad_compute": True, "cpu_offloading": True}
        ),
        precision=PrecisionSection(dtype="bf16", transformer={"fp8": "hybrid"}),
    )
    copy = forward_run(run)
    assert copy.model.transformer == {"attention_backend": "auto"}
    assert copy.parallel.transformer == {"tensor_model_parallel_size": 2}
    assert copy.precision == PrecisionSection(dtype="bf16")
    assert run.precision.transformer == {"fp8": "hybrid"}, "the run's own is not touched"


def test_places_by_chunk(monkeypatch):
    monkeypatch.setattr(regularizers, "CHUNK", 4)
    by_chunk = regularizers._by_chunk
    found = list(by_chunk(torch.tensor([1, 3, 9]), 10))
    assert [None if part is None else part.tolist() for part in found] == [[1, 3], None, [1]]
    assert list(by_chunk(None, 10)) == [None, None, None]
    assert len(list(by_chunk(None, 0))) == len(torch.empty(0).split(4))
