"""What a score is: the contract that every score follows. Imports no torch.

A score ranks columns [I], rows [O], elements [O, I] or whole matrices of a weight W [O, I]; it has the terms that it can
rank by. A column, row or matrix term is one or more sums over elements:

    sum_k = sum of terms[k](w, *x) over the rows of a column, the columns of a row, or the whole matrix
    score = finish(*sums)        of columns: finish(*sums, *statistics)

w [O, I] is |W|, of a score that compares two checkpoints |W - W_before|. x are the score's statistics, each [I], and of a
score that compares two checkpoints |W_before| [O, I]. So every rank can sum its own shard, and ranks add up, in float64.
`terms` get tensors (an element term numpy arrays), `finish` gets the sums of whole matrices, float64 [I], [O] or [1], as numpy
arrays.

A score is one `Score` in a file of its own, and one line in registry.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from megatron_ssu.scoring.scores_file import INPUT_MEAN_SQUARE, INPUT_NORM, TARGET_INPUT_NORM

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_ssu.models.parallel_model import ParallelModel
    from megatron_ssu.scoring.gather import Entry

# What must be run or read to compute a score:
#   weights   the model's weights
#   forward   a forward pass over calibration data
#   backward  a forward and backward pass over it
#   change    the weights of a second checkpoint
#   seed      nothing: it is drawn when a shield is planned
Needs = Literal["weights", "forward", "backward", "change", "seed"]
Term = Callable[..., Any]
Axis = Literal["column", "row", "element", "matrix"]
# Statistics of a layer's inputs by column: ||X_j||_2, the mean over rows of the mean of X_tj^2, ||X_j||_2 of target text.
STATISTICS = (INPUT_NORM, INPUT_MEAN_SQUARE, TARGET_INPUT_NORM)


def weight(w: Any, *x: Any) -> Any:
    """The term |W_ij|."""
    return w


def square(w: Any, *x: Any) -> Any:
    """The term W_ij^2."""
    return w * w


def one(w: Any, *x: Any) -> Any:
    """The term 1, whose sum counts elements: for means and variances."""
    return w * 0 + 1


def product(w: Any, x: Any) -> Any:
    """The term |W_ij| x_j."""
    return w * x


def statistic(w: Any, x: Any) -> Any:
    """The term x_j."""
    return x


def total(s: Any) -> Any:
    """The sum itself."""
    return s


def root(s: Any) -> Any:
    """The square root of the sum: of `square` the L2 norm."""
    return s**0.5


@dataclass(frozen=True)
class Summed:
    """A column, row or matrix term; see the module docstring."""

    terms: tuple[Term, ...]
    finish: Term = total


@dataclass(frozen=True)
class Whole:
    """A matrix term that needs the whole matrix: W float32 [O, I] on the rank's device -> score."""

    of: Callable[[Tensor], float]


@dataclass(frozen=True)
class Elements:
    """An element term, computed when a shield is planned: term(w, *factors), a numpy array that broadcasts to [O, I].

    w is as in the module docstring, float32 (float64 of float64 weights), None unless `weights`.
    """

    term: Term
    factors: tuple[str, ...] = ()  # tensors of the scores file, 'NAME/column' as [I], 'NAME/row' as [O, 1]
    weights: bool = True
    scale_free: bool = (
        True  # multiplying a factor changes no rank; factors are then scaled so that products stay in range
    )


class GradientPass:
    """What a `backward` score has open during the calibration pass, in which every micro-batch is one row."""

    def close(self) -> None:
        """The pass has ended, maybe by an exception."""
        raise NotImplementedError

    def entries(self, samples: int) -> list[Entry]:
        """The scores over all ranks' rows, of which there are `samples`. Collective."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises UserError, naming the matrix, for NaN or infinite gradients."""
        raise NotImplementedError


@dataclass(frozen=True)
class Score:
    """A registered score; a granularity whose term is None is one that the score does not have."""

    name: str
    needs: Needs
    column: Summed | None = None
    row: Summed | None = None
    element: Elements | None = None
    matrix: Summed | Whole | None = None
    statistics: tuple[str, ...] = ()  # of the inputs, in the order of the terms' arguments; see input_statistics.py
    gradients: Callable[[ParallelModel], GradientPass] | None = None  # of a backward score, whose terms it computes

    def __post_init__(self) -> None:
        """Raises ValueError for what does not go together."""
        if self.needs not in get_args(Needs):
            raise ValueError(
                f"score {self.name}: needs must be one of {', '.join(get_args(Needs))}, got {self.needs!r}"
            )
        unknown = [name for name in self.statistics if name not in STATISTICS]
        if unknown:
            raise ValueError(f"score {self.name}: statistics must be of {', '.join(STATISTICS)}, got {unknown[0]!r}")
        if self.statistics and self.needs != "forward":
            raise ValueError(
                f"score {self.name}: has statistics of inputs, so needs must be 'forward', got {self.needs!r}"
            )
        if (self.gradients is None) == (self.needs == "backward"):
            raise ValueError(f"score {self.name}: gradients must be given where needs is 'backward', and only there")

    @property
    def granularities(self) -> tuple[str, ...]:
        """What it can rank. A matrix without a term of its own has the mean of its column score, a layer that of its
        matrices."""
        if self.needs in ("seed", "backward"):  # drawn, or kept by column and row
            return ("column", "row", "element", "matrix", "layer")
        own = tuple(axis for axis in ("column", "row", "element") if getattr(self, axis) is not None)
        return (*own, "matrix", "layer") if self.matrix or self.column else own

    @property
    def needs_calibration(self) -> bool:
        return self.needs in ("forward", "backward")

    @property
    def needs_target(self) -> bool:
        """Whether it needs a second forward pass, over target text."""
        return TARGET_INPUT_NORM in self.statistics
