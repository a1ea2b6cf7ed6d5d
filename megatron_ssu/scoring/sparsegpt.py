"""sparsegpt-diagonal: the mean square of the inputs, the diagonal of SparseGPT's Hessian (arXiv 2301.00774).

Rows rank by sum_j E_j, which is the same for all of them; those of sparsegpt-diagonal-released by sum_j |W_ij| E_j, as the
released code of arXiv 2512.04844 computes them. Its column score is a running average over the calibration rows in their order,
which would depend on the mesh; here both take the mean.
"""

from __future__ import annotations

from megatron_ssu.scoring.base import Elements, Score, Summed, product, statistic
from megatron_ssu.scoring.scores_file import INPUT_MEAN_SQUARE

_COLUMN = Summed((), lambda x: x)


def _score(name: str, row: Summed) -> Score:
    return Score(
        name,
        needs="forward",
        statistics=(INPUT_MEAN_SQUARE,),
        column=_COLUMN,
        row=row,
        element=Elements(statistic, (f"{name}/column",), weights=False),
    )


SPARSEGPT_DIAGONAL = _score("sparsegpt-diagonal", Summed((statistic,)))
SPARSEGPT_DIAGONAL_RELEASED = _score("sparsegpt-diagonal-released", Summed((product,)))
