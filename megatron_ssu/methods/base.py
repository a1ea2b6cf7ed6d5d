"""What a method is: where a shield comes from and when it changes.

A method is one class in one file, registered by `@register`. The trainer calls

    check(run, source, begun)   on one rank, before data is tokenized and the model loaded: refuses what it can by then
    shield(session, begun)   once, on all ranks, before DDP wraps the model: the shield of the run; `begun` where a
                             checkpoint is there to go on from: then the shield is the one that it was trained under
    present_shield(run, source)   on one rank: the same of a run that has begun, where it needs no scoring, else None

and knows nothing else of methods. True means frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from megatron_ssu.config.schema import RunConfig
from megatron_ssu.errors import UserError
from megatron_ssu.models.parallel_model import ParallelModel
from megatron_ssu.models.source import Source
from megatron_ssu.shield.shield_file import Shield


class Method(Protocol):
    """See the module docstring."""

    def check(self, run: RunConfig, source: Source, *, begun: bool) -> None:
        """Raises UserError where what is there already does not fit the run file. Makes nothing."""
        ...

    def shield(self, session: ParallelModel, *, begun: bool) -> Shield:
        """The shield that training starts with. Collective; raises UserError on all ranks alike, also where the shield of
        a run that has begun would come out another, and replaces nothing then."""
        ...

    def present_shield(self, run: RunConfig, source: Source) -> Shield | None:
        """The shield of a run that has begun, without the model's weights; None where it takes a session to make it."""
        ...


_METHODS: dict[str, Callable[[], Method]] = {}


def register(name: str) -> Callable[[type], type]:
    """Class decorator: make a method known as `shield.method=name`."""

    def add(cls: type) -> type:
        if name in _METHODS:
            raise ValueError(f"method {name} is registered twice")
        _METHODS[name] = cls
        return cls

    return add


def method_named(name: str) -> Method:
    """Raises UserError, listing the methods there are, for an unknown name."""
    from megatron_ssu.methods import static  # noqa: F401 - registers its methods

    if name not in _METHODS:
        raise UserError(f"shield.method: {name!r} is unknown; choose from {', '.join(sorted(_METHODS))}")
    return _METHODS[name]()
