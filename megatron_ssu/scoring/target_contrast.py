"""target-contrast: what the source needs more than the target, (source + EPS) / (target + EPS).

Source and target are a matrix's wanda scores over calibration data and over target text, each divided by its mean over the
matrix's columns, rows or elements. Columns that the target needs and the source does not come last.
"""

from __future__ import annotations

from typing import Any

from megatron_ssu.scoring.base import Elements, Score, Summed, weight
from megatron_ssu.scoring.scores_file import INPUT_NORM, TARGET_INPUT_NORM

EPS = 0.01  # of the mean: what is far below it in both counts alike in both


def contrast(source: Any, target: Any) -> Any:
    """Of wanda scores of one matrix, numpy arrays of one shape."""
    source, target = (values / (float(values.mean(dtype="float64")) or 1.0) for values in (source, target))
    return (source + EPS) / (target + EPS)


TARGET_CONTRAST = Score(
    "target-contrast",
    needs="forward",
    statistics=(INPUT_NORM, TARGET_INPUT_NORM),
    column=Summed((weight,), lambda s, source, target: contrast(s * source, s * target)),
    row=Summed((lambda w, source, target: w * source, lambda w, source, target: w * target), contrast),
    element=Elements(
        lambda w, source, target: contrast(w * source, w * target),
        (f"{INPUT_NORM}/column", f"{TARGET_INPUT_NORM}/column"),
    ),
)
