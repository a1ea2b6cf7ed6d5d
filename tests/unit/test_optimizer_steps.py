"""The count of steps that an optimizer has taken, wherever it keeps it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ssu.engine.optimizer import set_steps, steps


class CountsPerGroup(torch.optim.SGD):
    """As Apex' and Transformer Engine's Adam, whose kernels take whole numbers."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1


def chained(*optimizers: torch.optim.Optimizer | None) -> Any:
    members = [SimpleNamespace(optimizer=found, is_stub_optimizer=found is None) for found in optimizers]
    return SimpleNamespace(chained_optimizers=members)


def stepped(kind: Any, count: int) -> torch.optim.Optimizer:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = kind([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)
    for _ in range(count):
        for param in params:
            param.grad = torch.ones(3)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", [torch.optim.AdamW, CountsPerGroup])
def test_steps_are_counted_and_set(kind: Any) -> None:
    optimizer = stepped(kind, 3)
    assert steps(chained(None, optimizer)) == 3
    set_steps(chained(None, optimizer), 7)
    assert steps(chained(None, optimizer)) == 7
    for group in optimizer.param_groups:
        assert ("step" in group) == (kind is CountsPerGroup)
        assert type(group.get("step", 7)) is int
    for state in optimizer.state.values():
        assert ("step" in state) == (kind is not CountsPerGroup)
        assert "step" not in state or (state["step"] == 7 and isinstance(state["step"], torch.Tensor))


def test_a_count_is_set_before_the_first_step() -> None:
    optimizer = stepped(CountsPerGroup, 0)
    set_steps(chained(optimizer), 5)
    assert [group["step"] for group in optimizer.param_groups] == [5, 5]


def test_where_nothing_trains_no_step_is_counted() -> None:
    assert steps(chained(None)) == 0
    set_steps(chained(None), 4)
    assert steps(chained(None)) == 0
