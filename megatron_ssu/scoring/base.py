"""What a score is: the contract that scores follow, and the list of them.

A score ranks the columns [I] and rows [O] of a weight matrix W [O, I] from |W| and from a statistic x [I] of its input.
It is a sum over elements, so each rank can sum its own shard, and ranks add up in float64:

    column_j = finish( sum_i term(|W_ij|), x_j )             row_i = sum_j row_term(|W_ij|, x_j)

`random` needs no calibration and no weights and is drawn when a shield is planned; `fisher` comes from gradients (fisher.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_ssu.errors import UserError
from megatron_ssu.scoring.scores_file import INPUT_MEAN_SQUARE, INPUT_NORM

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ElementScore:
    """A score as in the module docstring; all tensors float64 on the rank's device.

    statistic: input_norm (||X_j||_2 over all real tokens), input_mean_square (mean over calibration rows of the mean over
        the row's real tokens of X_tj^2), or None: no calibration pass.
    """

    name: str
    statistic: str | None
    term: Callable[[Tensor], Tensor]
    finish: Callable[[Tensor, Tensor], Tensor]
    row_term: Callable[[Tensor, Tensor], Tensor]


SCORES: dict[str, ElementScore] = {
    score.name: score
    for score in (
        # The paper's formula: S_j = ||X_j||_2 ||W_:j||_1.
        ElementScore("wanda", INPUT_NORM, lambda w: w, lambda s, x: s * x, lambda w, x: w * x),
        # The released code: ||W_:j||_2 mean_t(X_tj^2); rows by the like-named sum over elements.
        ElementScore(
            "wanda-released", INPUT_MEAN_SQUARE, lambda w: w * w, lambda s, x: s.sqrt() * x, lambda w, x: w * x
        ),
        ElementScore("magnitude", None, lambda w: w, lambda s, x: s, lambda w, x: w),
        # mean_t(X_tj^2) alone; all rows are alike.
        ElementScore(
            "sparsegpt-diagonal", INPUT_MEAN_SQUARE, lambda w: w * 0, lambda s, x: x, lambda w, x: x.expand_as(w)
        ),
    )
}
DRAWN = ("random",)
GRADIENT = ("fisher",)
NAMES = (*SCORES, *DRAWN, *GRADIENT)


def check_names(names: list[str], key: str = "shield.score") -> None:
    """Raises UserError, listing what there is, for an unknown score; `key` is the run file's that names them."""
    for name in names:
        if name not in NAMES:
            raise UserError(f"{key}: {name!r} is unknown; choose from {', '.join(NAMES)}")


def needs_calibration(names: list[str]) -> bool:
    return any(n in GRADIENT or (n in SCORES and SCORES[n].statistic is not None) for n in names)
