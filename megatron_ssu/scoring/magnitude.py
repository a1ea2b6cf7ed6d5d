"""magnitude: weights alone, L1 norms; magnitude-released: L2 norms, as the released code of arXiv 2512.04844 takes them."""

from __future__ import annotations

from megatron_ssu.scoring.base import Elements, Score, Summed, root, square, weight

MAGNITUDE = Score(
    "magnitude", needs="weights", column=Summed((weight,)), row=Summed((weight,)), element=Elements(weight)
)
MAGNITUDE_RELEASED = Score(
    "magnitude-released",
    needs="weights",
    column=Summed((square,), root),
    row=Summed((square,), root),
    element=Elements(weight),
)
