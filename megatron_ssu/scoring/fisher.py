"""fisher: the mean squared gradient of the calibration loss, summed by column and by row.

A sample is one row of the packed calibration data; its loss is the mean over its real tokens of the next token's cross
entropy. For W [O, I] and N rows: column_j = 1/N sum_n sum_i (dL_n/dW_ij)^2, row_i = 1/N sum_n sum_j (dL_n/dW_ij)^2.
Squared gradients of single elements are not kept: elements rank by row score times column score, the rank-one estimate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_ssu.scoring.base import Elements, GradientPass, Score

if TYPE_CHECKING:
    from megatron_ssu.models.parallel_model import ParallelModel

NAME = "fisher"


def _outer(w: Any, row: Any, column: Any) -> Any:
    return row * column


def _gradients(session: ParallelModel) -> GradientPass:
    from megatron_ssu.scoring.squared_gradients import SquaredGradients

    return SquaredGradients(session, NAME)


FISHER = Score(
    NAME,
    needs="backward",
    gradients=_gradients,
    element=Elements(_outer, (f"{NAME}/row", f"{NAME}/column"), weights=False),
)
