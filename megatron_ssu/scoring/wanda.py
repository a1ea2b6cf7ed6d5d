"""wanda: weight times input, the formula of Source-Shielded Updates (arXiv 2512.04844); wanda-released: its released code."""

from __future__ import annotations

from typing import Any

from megatron_ssu.scoring.base import Elements, Score, Summed, product, root, square, weight
from megatron_ssu.scoring.scores_file import INPUT_MEAN_SQUARE, INPUT_NORM

WANDA = Score(
    "wanda",
    needs="forward",
    statistics=(INPUT_NORM,),
    column=Summed((weight,), lambda s, x: s * x),
    row=Summed((product,)),
    element=Elements(product, (f"{INPUT_NORM}/column",)),
)


def _raised(w: Any, x: Any) -> Any:
    return w * (1 + x)


# ||W_:j||_2 E_j by column, ||W_i:||_2 by row, |W_ij| (1 + E_j) by element, E_j = mean_t(X_tj^2).
WANDA_RELEASED = Score(
    "wanda-released",
    needs="forward",
    statistics=(INPUT_MEAN_SQUARE,),
    column=Summed((square,), lambda s, x: s**0.5 * x),
    row=Summed((square,), root),
    element=Elements(_raised, (f"{INPUT_MEAN_SQUARE}/column",), scale_free=False),
)
