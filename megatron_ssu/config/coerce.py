"""Plain YAML values to typed ones: what a field's annotation accepts, and in one line what it does not.

Works on the annotations of our own sections and on those of megatron-core's dataclasses. A bool is not a number; 3 is a
number too, but 3.0 is not a whole number; NaN and infinity are refused; text is never made from a number.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import functools
import math
import re
import sys
import types
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from megatron_ssu.io.dtypes import TORCH_NAMES

KeyPath = tuple[str, ...]

# What a run file may write for a dtype: torch's name of it. torch itself is imported when one is read.
DTYPES: Mapping[str, str] = types.MappingProxyType(
    {
        **TORCH_NAMES,
        **{name: name for name in TORCH_NAMES.values()},
        "half": "float16",
        "float": "float32",
        "uint8": "uint8",  # FP8 optimizer states
    }
)
# YAML 1.1 reads 1e-4 and 1e3 as text
_EXPONENT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+")


@functools.cache
def field_hints(cls: type) -> Mapping[str, Any]:
    """Resolved annotations of the dataclass `cls`; an unresolvable one becomes `object`, which is not settable."""
    try:
        return get_type_hints(cls)
    except (NameError, TypeError, AttributeError):
        return {f.name: _resolve(cls, f) for f in dataclasses.fields(cls)}


def _resolve(cls: type, field: dataclasses.Field) -> Any:
    if not isinstance(field.type, str):
        return field.type
    owner = next((c for c in cls.__mro__ if field.name in vars(c).get("__annotations__", {})), cls)
    try:
        return eval(field.type, dict(vars(sys.modules[owner.__module__])))
    except Exception:  # whatever another package's annotation trips over, the field is merely not settable
        return object


def field_default(field: dataclasses.Field) -> Any:
    """The default of a dataclass field, `dataclasses.MISSING` where it is required."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def field_hint(cls: type, field: dataclasses.Field) -> Any:
    """The annotation of one field; `x: int = None` counts as `int | None`."""
    hint = field_hints(cls).get(field.name, object)
    if field.default is None and hint is not object:
        return hint | None
    return hint


def is_dtype(hint: Any) -> bool:
    """True for torch.dtype; asked without an import of torch."""
    return isinstance(hint, type) and (hint.__module__, hint.__name__) == ("torch", "dtype")


def is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def settable(hint: Any) -> bool:
    """Whether a run file can hold a value of this type; callables and foreign classes cannot be written down."""
    if is_union(hint):
        return any(settable(arm) for arm in get_args(hint) if arm is not types.NoneType)
    if get_origin(hint) in (list, tuple, dict):
        return all(settable(arm) for arm in get_args(hint) if arm is not Ellipsis)
    if get_origin(hint) is Literal or hint in (bool, int, float, str, list) or is_dtype(hint):
        return True
    return isinstance(hint, type) and (issubclass(hint, enum.Enum) or hint.__module__.startswith("megatron_ssu."))


def describe(hint: Any) -> str:
    """What a value of this type looks like, in words."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
    if hint in names:
        return names[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return one_of(args)
    if is_union(hint):
        arms = dict.fromkeys(describe(arm) for arm in args if arm is types.NoneType or settable(arm))
        return " or ".join(arms)
    if origin is list:
        return f"a list of {describe(args[0])}"
    if origin is dict:
        return f"a mapping of names to {describe(args[1])}"
    if origin is tuple:
        return f"a list of {len(args)} values ({', '.join(describe(arm) for arm in args)})"
    if is_dtype(hint):
        return one_of(DTYPES)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return one_of(hint.__members__)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return f"a mapping ({', '.join(f.name for f in dataclasses.fields(hint))})"
    return "a list" if hint is list else "a value"


def one_of(choices: Any) -> str:
    words = [show(choice) for choice in choices]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def show(value: Any) -> str:
    """A value as a message shows it: one line, short, as YAML would write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple | set):
        return "a list"
    try:
        text = repr(value) if isinstance(value, str | bytes) else str(value)
    except ValueError:  # Python refuses to print very long integers
        return "a very long number"
    return text if len(text) <= 80 else f"{text[:77]}..."


def did_you_mean(name: str, known: Any) -> str:
    """The name in `known` that `name` is likely meant to be: one that it begins, or a similar one; empty for none."""
    begun = [other for other in known if len(name) > 3 and other.startswith(name)]
    close = begun or get_close_matches(name, list(known), n=1, cutoff=0.7)
    return min(close, key=len) if close else ""


class Reader:
    """Reads one value at a dotted path; `fail` raises with that path, `section` reads a nested dataclass of ours."""

    def __init__(
        self, fail: Callable[[KeyPath, str], NoReturn], section: Callable[[type, Mapping[Any, Any], KeyPath], Any]
    ) -> None:
        self._fail = fail
        self._section = section

    def value(self, hint: Any, value: Any, path: KeyPath) -> Any:
        """`value` as the type `hint`, or `fail`."""
        if not settable(hint):
            self._fail(path, "cannot be set from a run file; leave it out")
        if is_union(hint):
            return self._union(hint, value, path)
        origin = get_origin(hint)
        if origin is Literal:
            return self._literal(hint, value, path)
        if origin in (list, tuple) or hint is list:
            return self._list(hint, value, path)
        if origin is dict:
            return self._table(hint, value, path)
        if is_dtype(hint):
            name = value.removeprefix("torch.") if isinstance(value, str) else value
            return _dtype(DTYPES[name]) if isinstance(name, str) and name in DTYPES else self._wrong(hint, value, path)
        if issubclass(hint, enum.Enum):
            members = hint.__members__
            return members[value] if isinstance(value, str) and value in members else self._wrong(hint, value, path)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            return self._section(hint, value, path) if isinstance(value, dict) else self._wrong(hint, value, path)
        return self._scalar(hint, value, path)

    def _wrong(self, hint: Any, value: Any, path: KeyPath, advice: str = "") -> NoReturn:
        self._fail(path, f"expected {describe(hint)}, not {show(value)}{advice and '; ' + advice}")

    def _union(self, hint: Any, value: Any, path: KeyPath) -> Any:
        arms = get_args(hint)
        optional = types.NoneType in arms
        if value is None and optional:
            return None
        chosen = any(get_origin(arm) is Literal and value in get_args(arm) for arm in arms)
        if optional and isinstance(value, str) and value.lower() == "none" and not chosen:
            self._wrong(hint, value, path, "for nothing write null, or leave the key out")
        arms = tuple(arm for arm in arms if arm is not types.NoneType and settable(arm))
        if len(arms) == 1:
            simple = arms[0] in (bool, int, float, str)
            return self._scalar(arms[0], value, path, hint) if simple else self.value(arms[0], value, path)
        for arm in arms:
            if _same_kind(arm, value):
                return self.value(arm, value, path)
        return self._wrong(hint, value, path, _advice(arms[0], value))

    def _literal(self, hint: Any, value: Any, path: KeyPath) -> Any:
        choices = get_args(hint)
        if any(type(value) is type(choice) and value == choice for choice in choices):
            return value
        guess = did_you_mean(value, choices) if isinstance(value, str) else ""
        self._wrong(hint, value, path, f"did you mean {guess!r}?" if guess else "")

    def _list(self, hint: Any, value: Any, path: KeyPath) -> Any:
        if not isinstance(value, list):
            self._wrong(hint, value, path)
        args = get_args(hint)
        if hint is list or not args:
            return [self._plain(item, (*path, str(i))) for i, item in enumerate(value)]
        if get_origin(hint) is list:
            return [self.value(args[0], item, (*path, str(i))) for i, item in enumerate(value)]
        if Ellipsis in args:
            return tuple(self.value(args[0], item, (*path, str(i))) for i, item in enumerate(value))
        if len(args) != len(value):
            self._fail(path, f"expected {describe(hint)}, not {len(value)} values")
        return tuple(self.value(arm, item, (*path, str(i))) for i, (arm, item) in enumerate(zip(args, value)))

    def _table(self, hint: Any, value: Any, path: KeyPath) -> Any:
        """A mapping whose keys are the user's own words."""
        if not isinstance(value, dict):
            self._wrong(hint, value, path)
        for key in value:
            if not isinstance(key, str):
                self._fail(path, f"the key {show(key)} is not a word; put it in quotes or remove it")
        return {key: self.value(get_args(hint)[1], member, (*path, key)) for key, member in value.items()}

    def _plain(self, value: Any, path: KeyPath, depth: int = 1) -> Any:
        """An item of a list of no declared type: words, numbers and lists of them (not deeper: aliases can explode)."""
        if isinstance(value, list) and depth < 2:
            return [self._plain(item, (*path, str(i)), depth + 1) for i, item in enumerate(value)]
        if isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
            return value
        self._wrong(str | float | list, value, path)

    def _scalar(self, hint: type, value: Any, path: KeyPath, whole: Any = None) -> Any:
        """bool, int, float or str; `whole` is the annotation to describe when it is more than `hint`."""
        if hint is float and not isinstance(value, bool):
            number = value
            if isinstance(value, str) and _EXPONENT.fullmatch(value):
                number = float(value)
            if isinstance(number, int | float):
                try:
                    number = float(number)
                except OverflowError:
                    number = math.inf
                return number if math.isfinite(number) else self._fail(path, f"expected a finite number, not {number}")
        elif isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
            return value
        return self._wrong(whole or hint, value, path, _advice(hint, value))


def _same_kind(arm: Any, value: Any) -> bool:
    """Whether `arm` is the member of a union that a value of this YAML kind is meant for."""
    origin = get_origin(arm)
    if isinstance(value, dict):
        return origin is dict or (isinstance(arm, type) and dataclasses.is_dataclass(arm))
    if isinstance(value, list):
        return arm is list or origin in (list, tuple)
    if isinstance(value, bool):
        return arm is bool
    if isinstance(value, int):
        return arm in (int, float)
    if isinstance(value, float):
        return arm is float
    if isinstance(value, str):
        if arm is float:
            return bool(_EXPONENT.fullmatch(value))
        enumerated = isinstance(arm, type) and issubclass(arm, enum.Enum)
        return arm is str or is_dtype(arm) or origin is Literal or enumerated
    return False


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def _advice(hint: Any, value: Any) -> str:
    """What to write instead, where that is known."""
    if hint is str and isinstance(value, bool | int | float | datetime.date):
        return "put it in quotes"
    if hint is bool and isinstance(value, str) and value.lower() in ("true", "false", "yes", "no", "on", "off"):
        return "remove the quotes"
    if hint is bool and value in (0, 1) and isinstance(value, int):
        return f"write {show(bool(value))}"
    if hint not in (int, float) or isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return ""
    if hint is int and math.isfinite(number) and number.is_integer():
        return f"write {int(number)}"
    return "remove the quotes" if hint is float and math.isfinite(number) else ""
