"""The learning rate over a run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_ssu.config.schema import CheckpointSection, ModelSection, RunConfig, ScheduleSection, TrainSection
from megatron_ssu.train.schedule import build_schedule


def rates(iterations: int, warmup: float) -> list[float]:
    """The learning rate of every step."""
    run = RunConfig(ModelSection("m"), CheckpointSection("c"))
    run.train = TrainSection(iterations=iterations, schedule=ScheduleSection(warmup_fraction=warmup))
    run.train.optimizer |= {"lr": 1.0, "min_lr": 0.0}
    optimizer = SimpleNamespace(param_groups=[{}])
    schedule, found = build_schedule(run, optimizer), []
    for _ in range(iterations):
        schedule.step(1)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize(
    ("iterations", "fraction", "peak"), [(12200, 0.05, 610), (12210, 0.05, 611), (10, 0.01, 1), (20, 0.26, 6)]
)
def test_warm_up_is_rounded_up_as_the_hf_trainer_does(iterations: int, fraction: float, peak: int) -> None:
    from transformers import TrainingArguments

    assert TrainingArguments.get_warmup_steps(SimpleNamespace(warmup_steps=fraction), iterations) == peak
    found = rates(iterations, fraction)
    assert found.index(max(found)) + 1 == peak and max(found) == 1.0


@pytest.mark.parametrize("iterations", [10, 1, 2])
def test_warm_up_leaves_a_step_to_decay(iterations: int) -> None:
    found = rates(iterations, 0.96)
    assert len(found) == iterations and all(0 <= rate <= 1 for rate in found)
    assert found[-1] == 0.0
