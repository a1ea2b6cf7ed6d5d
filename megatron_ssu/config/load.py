"""Run files: YAML and dotted overrides in, a `RunConfig` out, and back again.

Plain mappings are merged first (defaults <- YAML <- overrides), then every section is built once, strictly. Paths stay
as they are written: relative ones are relative to the working directory, `~` and variables are not expanded.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from megatron_ssu.config.coerce import (
    KeyPath,
    Reader,
    did_you_mean,
    field_default,
    field_hint,
    field_hints,
    is_dtype,
    is_union,
    show,
)
from megatron_ssu.config.schema import Phase, PhaseSection, RunConfig
from megatron_ssu.errors import UserError
from megatron_ssu.io.atomic import write_text

MAX_BYTES = 1 << 20  # a run file is a page of text; more is a checkpoint or a data set given by mistake

# What other trainers call our keys; only used to give a hint.
ALIASES = {
    "tp": "parallel.tensor_model_parallel_size",
    "tensor": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "pipeline": "parallel.pipeline_model_parallel_size",
    "vpp": "parallel.virtual_pipeline_model_parallel_size",
    "cp": "parallel.context_parallel_size",
    "context": "parallel.context_parallel_size",
    "learning_rate": "train.optimizer.lr",
    "batch_size": "train.global_batch_size",
    "steps": "train.iterations",
    "max_steps": "train.iterations",
    "train_iters": "train.iterations",
    "seq_length": "data.sequence_length",
    "output_dir": "checkpoint.directory",
    "save": "checkpoint.directory",
    "model_name_or_path": "model.path",
}

# Sections that a phase may give for itself.
PHASE_SECTIONS = ("method", "shield", "data", "train", "replay")
# Keys of which one stands for the others: a phase that gives one takes none of the others from above.
_ALTERNATIVES: dict[KeyPath, frozenset[str]] = {
    ("train",): frozenset(("iterations", "tokens", "epochs")),
    ("replay",): frozenset(("path", "generate")),
}

_OCTAL = re.compile(r"[-+]?0[0-9_]+")


class _Loader(yaml.SafeLoader):
    """YAML without the numbers that YAML 1.2 has dropped: to the base 60 (11:50:00) and octal ones (010) are text, which
    no number field takes."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        number = kind is yaml.ScalarNode and tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        return self.DEFAULT_SCALAR_TAG if number and (":" in value or _OCTAL.fullmatch(value)) else tag


def load_run(path: str | Path, overrides: Sequence[str] = (), methods: Mapping[str, type] | None = None) -> RunConfig:
    """Read the run file at `path`; each override is `section.key=value` with a YAML value, `section.key=` means null.

    An override may name a section's key, a member of a nested mapping (`train.optimizer.lr=1e-4`) or an item of a list
    that the file has (`data.train.0.weight=2`); a mapping or list given as the value replaces the whole one.
    `methods`: method -> the dataclass of its options, the section method.<name>; without it no method is checked or has any.
    Raises UserError with the key, file and line when anything is unknown, missing or of the wrong type.
    """
    source = _Source(Path(path))
    tree = source.parse()
    for override in overrides:
        source.override(tree, override)
    phases = tree.pop("phases", None)
    run: RunConfig = _Builder(source, methods or {}).section(RunConfig, tree, ())
    return dataclasses.replace(run, phases=_phases(source, methods or {}, tree, phases))


def _phases(source: _Source, methods: Mapping[str, type], tree: dict[str, Any], raw: Any) -> list[Phase]:
    if raw is None:
        return []
    if not isinstance(raw, list):
        source.fail(("phases",), f"expected a list of phases, not {show(raw)}")
    found: list[Phase] = []
    for number, phase in enumerate(raw):
        path = ("phases", str(number))
        if not isinstance(phase, dict):
            source.fail(path, f"expected a mapping of keys, not {show(phase)}")
        own = {key: phase[key] for key in phase if key in PHASE_SECTIONS}
        for key, value in own.items():
            if value is not None and not isinstance(value, dict):
                source.fail((*path, key), f"expected a mapping of keys, not {show(value)}")
        rest = {key: phase[key] for key in phase if key not in PHASE_SECTIONS}
        section = _Builder(source, methods).section(PhaseSection, rest, path)
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", section.name, re.ASCII):
            source.fail((*path, "name"), f"must be letters, digits and . _ -, got {show(section.name)}")
        if section.name in [other.section.name for other in found]:
            source.fail((*path, "name"), f"{section.name!r} names an earlier phase too; give each its own")
        of_phase = _PhaseSource(source, path, own)
        found.append(Phase(section, _Builder(of_phase, methods).section(RunConfig, merged(tree, own), ())))
    return found


def merged(above: Mapping[str, Any], own: Mapping[str, Any], path: KeyPath = ()) -> dict[str, Any]:
    """The mapping `above` with `own` over it, mapping by mapping; lists and values are replaced."""
    group = _ALTERNATIVES.get(path, frozenset())
    given = {key for key in group if own.get(key) is not None}
    result = {key: value for key, value in above.items() if not (given and key in group)}
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value, (*path, key)) if both else value
    return result


def dump_run(run: RunConfig) -> str:
    """The resolved run file as YAML text; `load_run` of it gives an equal RunConfig."""
    return yaml.safe_dump(_plain(run), sort_keys=False, allow_unicode=True, width=120)


def save_run(run: RunConfig, path: str | Path) -> None:
    """Write `dump_run(run)` to `path`, whole or not at all; its folder is made. Raises UserError where that fails."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    write_text(path, dump_run(run))


def _plain(value: Any) -> Any:
    """Dataclasses to mappings, inline megatron fields beside the section's own; dtypes and enums to their names."""
    if isinstance(value, Phase):
        return _plain(value.section) | {name: _plain(getattr(value.run, name)) for name in PHASE_SECTIONS}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own: dict[str, Any] = {}
        inline: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            member = _plain(getattr(value, field.name))
            if field.metadata.get("inline"):
                inline.update(member)
            else:
                own[field.name] = member
        return {**own, **inline}
    if isinstance(value, dict):
        return {key: _plain(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(member) for member in value]
    if is_dtype(type(value)):
        return str(value).removeprefix("torch.")
    return value.name if isinstance(value, enum.Enum) else value


class _Source:
    """One run file and its overrides: knows which line or override every key came from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[KeyPath, int] = {}
        self.overridden: set[KeyPath] = set()

    def fail(self, path: KeyPath, message: str) -> NoReturn:
        dotted = ".".join(key if key.isprintable() else repr(key) for key in path)
        raise UserError(f"{self._place(path)}: {dotted}: {message}" if dotted else f"{self._place(path)}: {message}")

    def _place(self, path: KeyPath) -> str:
        # an override may have made the key itself (`x.key=1`) or one under it (`x.key.part=1`)
        if any(path[: len(o)] == o for o in self.overridden):
            return "command line"
        if path not in self.lines and any(o[: len(path)] == path for o in self.overridden if path):
            return "command line"
        above = (self.lines.get(path[:depth]) for depth in range(len(path), 0, -1))
        line = next((line for line in above if line), None)  # a key that is missing: where its section begins
        return f"{self.path}:{line}" if line else str(self.path)

    def parse(self) -> dict[str, Any]:
        """The file as plain mappings, lists and scalars."""
        text = self._read()
        loader = None
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            if node is None:
                raise UserError(f"{self.path}: is empty; a run file needs at least model.path and checkpoint.directory")
            if not isinstance(node, yaml.MappingNode):
                raise UserError(f"{self.path}: a run file has sections (model:, data:, ...); this is {_kind(node)}")
            self._walk(node, (), set(), set())
            return loader.construct_document(node)
        except yaml.MarkedYAMLError as error:
            raise UserError(f"{self.path}{_syntax(error)}") from error
        except (yaml.YAMLError, ValueError, OverflowError, TypeError, RecursionError) as error:
            reason = "nested too deep" if isinstance(error, RecursionError) else str(error).splitlines()[0]
            raise UserError(f"{self.path}: not readable as YAML: {reason}") from error
        finally:
            if loader is not None:
                loader.dispose()

    def _read(self) -> str:
        path = self.path
        try:
            if path.is_dir():
                raise UserError(f"{path}: is a directory; give the run file in it")
            if not path.exists():
                raise UserError(f"{path}: no such run file; relative paths start at {Path.cwd()}")
            size = path.stat().st_size
            if size > MAX_BYTES:
                raise UserError(
                    f"{path}: a run file must have at most {MAX_BYTES} bytes, got {size}; give the YAML file"
                )
            return path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save the run file as UTF-8") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{str(path)!r}: the run file cannot be read: {reason}") from error

    def _walk(self, node: yaml.Node, path: KeyPath, above: set[int], seen: set[int]) -> None:
        """Note the line of every key; refuse a key given twice and an anchor that holds itself."""
        if id(node) in above:
            raise UserError(f"{self.path}:{node.start_mark.line + 1}: an anchor (&) must not hold itself (*)")
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            return
        seen.add(id(node))
        above = above | {id(node)}
        if isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value):
                self.lines[(*path, str(number))] = item.start_mark.line + 1
                self._walk(item, (*path, str(number)), above, seen)
            return
        first: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                self.lines[(*path, key.value)] = line
                if key.value in first:
                    self.fail((*path, key.value), f"given twice, first on line {first[key.value]}; keep one")
                first[key.value] = line
            self._walk(value, (*path, str(getattr(key, "value", ""))), above, seen)

    def override(self, tree: dict[str, Any], text: str) -> None:
        """Set one `section.key=value` in `tree`."""
        dotted, equals, written = text.partition("=")
        keys = tuple(dotted.strip().split("."))
        if not equals or not all(keys):
            raise UserError(f"command line: {show(text)}: write an override as section.key=value")
        try:
            self.overridden.add(keys)
            value = yaml.load(written, _Loader) if written.strip() else None
            self._walk(yaml.compose(written, _Loader) or yaml.ScalarNode("", ""), keys, set(), set())
        except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"command line: {dotted}: {show(written)} is not a YAML value; put it in quotes") from error
        parent: Any = tree
        for depth in range(len(keys) - 1):
            child = self._child(parent, keys[: depth + 1])
            if child is None:
                child = parent[self._slot(parent, keys[: depth + 1])] = {}
            elif isinstance(child, dict | list):
                # a copy: YAML aliases may use the same mapping elsewhere too
                child = parent[self._slot(parent, keys[: depth + 1])] = child.copy()
            else:
                self.fail(keys, f"{'.'.join(keys[: depth + 1])} is {show(child)}, which has no key {keys[depth + 1]!r}")
            parent = child
        parent[self._slot(parent, keys)] = value

    def _child(self, parent: Any, keys: KeyPath) -> Any:
        slot = self._slot(parent, keys)
        return parent[slot] if isinstance(parent, list) else parent.get(slot)

    def _slot(self, parent: Any, keys: KeyPath) -> Any:
        """The last of `keys` as a key of the mapping, or an index into the list, `parent`."""
        if isinstance(parent, dict):
            return keys[-1]
        if keys[-1].isdecimal() and int(keys[-1]) < len(parent):
            return int(keys[-1])
        what = f"{'.'.join(keys[:-1])} is a list of {len(parent)}"
        self.fail(
            keys, f"{what}; name an item by its number, from 0 to {len(parent) - 1}" if parent else f"{what} items"
        )


class _PhaseSource:
    """The run file of a phase: names a key where it stands, in the phase or above."""

    def __init__(self, source: _Source, phase: KeyPath, own: Mapping[str, Any]) -> None:
        self._source, self._phase, self._own = source, phase, own

    def fail(self, path: KeyPath, message: str) -> NoReturn:
        self._source.fail((*self._phase, *path) if self._holds(path) else path, message)

    def _holds(self, path: KeyPath) -> bool:
        found: Any = self._own
        for key in path:
            if isinstance(found, list) and key.isdecimal() and int(key) < len(found):
                found = found[int(key)]
            elif isinstance(found, Mapping) and key in found:
                found = found[key]
            else:
                return isinstance(found, Mapping) and found is not self._own
        return bool(path)


class _Builder:
    """Builds sections out of plain mappings; every key must be known, every value of its declared type."""

    def __init__(self, source: _Source | _PhaseSource, methods: Mapping[str, type]) -> None:
        self._source, self._methods = source, methods
        self._reader = Reader(source.fail, self.section)

    def section(self, cls: type, raw: Mapping[Any, Any] | None, path: KeyPath) -> Any:
        """The dataclass `cls` out of `raw`; an empty section (null) has its defaults."""
        own = {f.name: f for f in dataclasses.fields(cls) if not f.metadata.get("inline")}
        inline = [f for f in dataclasses.fields(cls) if "names" in f.metadata and f.metadata["inline"]]
        variants = next((f for f in dataclasses.fields(cls) if f.metadata.get("variants")), None)
        values: dict[str, Any] = {f.name: field_default(f) for f in (*inline, *((variants,) if variants else ()))}
        for key, value in (raw or {}).items():
            here = (*path, self._name(key, path))
            holder = next((f for f in inline if key in f.metadata["names"]), None)
            if key in own:
                values[key] = self._member(cls, own[key], value, here)
                if here == ("method", "name") and self._methods and value not in self._methods:
                    self._source.fail(here, f"must be one of {', '.join(self._methods)}, got {show(value)}")
            elif holder is not None:
                values[holder.name][key] = self._megatron(holder, key, value, here)
            elif variants is not None and key in self._methods:
                values[variants.name][key] = self._options(self._methods[key], value, here)
            else:
                known = [name for f in inline for name in f.metadata["names"]] + list(own)
                known += list(self._methods) if variants else list(PHASE_SECTIONS) if cls is PhaseSection else []
                self._unknown(key, path, cls, known)
        for name, field in own.items():
            if name not in values and field_default(field) is dataclasses.MISSING:
                if _section_class(field_hints(cls)[name]):  # let it name the first key that it lacks
                    values[name] = self.section(field_hints(cls)[name], {}, (*path, name))
                    continue
                self._source.fail((*path, name), "missing; the run file must give it")
        return cls(**values)

    def _options(self, cls: type, raw: Any, path: KeyPath) -> Any:
        if raw is not None and not isinstance(raw, dict):
            self._source.fail(path, f"expected a mapping of keys, not {show(raw)}")
        return self.section(cls, raw, path)

    def _name(self, key: Any, path: KeyPath) -> str:
        if not isinstance(key, str):
            self._source.fail(path, f"the key {show(key)} is not a word; put it in quotes or remove it")
        return key

    def _member(self, cls: type, field: dataclasses.Field, value: Any, path: KeyPath) -> Any:
        hint = field_hint(cls, field)
        nested = _section_class(hint) or "megatron" in field.metadata
        if nested and value is not None and not isinstance(value, dict):
            self._source.fail(path, f"expected a mapping of keys, not {show(value)}")
        if "megatron" in field.metadata:
            values = field_default(field)
            for key, member in (value or {}).items():
                here = (*path, self._name(key, path))
                if key not in field.metadata["names"]:
                    self._unknown(key, path, None, sorted(field.metadata["names"]), field.metadata["owned"])
                values[key] = self._megatron(field, key, member, here)
            return values
        return self.section(hint, value, path) if nested else self._reader.value(hint, value, path)

    def _megatron(self, field: dataclasses.Field, name: str, value: Any, path: KeyPath) -> Any:
        return self._reader.value(field.metadata["megatron"].hint(name), value, path)

    def _unknown(
        self, key: str, path: KeyPath, cls: type | None, known: list[str], owned: Mapping[str, str] | None = None
    ) -> NoReturn:
        """Refuse `key`, with the likeliest thing that was meant."""
        owned = dict(owned or {})
        for field in dataclasses.fields(cls) if cls else ():
            owned.update(field.metadata.get("owned", {}) if field.metadata.get("inline") else {})
            if field.name == key:  # an inline field's own name
                self._source.fail((*path, key), f"unknown key; write its keys directly under {'.'.join(path)}")
        here = (*path, key)
        if here == ("shield", "method"):
            self._source.fail(here, "is method.name now; write `method: {name: ssu}`, or none for full fine-tuning")
        if here[-2:] == ("train", "phase"):
            self._source.fail(here, "is the list `phases` now, each with its own name, data, method and train section")
        if key in owned:
            self._source.fail(here, f"{owned[key]}; leave it out")
        places, decided = _catalogue()
        if places.get(key) and path:
            self._source.fail(here, f"unknown key; it belongs under {' or '.join(places[key][:3])}")
        if places.get(key):
            self._source.fail(here, f"unknown section; the key belongs under {' or '.join(places[key][:3])}")
        if key in decided:
            self._source.fail(here, f"{decided[key]}; leave it out")
        guess = did_you_mean(key, known)
        if not guess and key in ALIASES:
            guess = ALIASES[key]
        if not guess and (far := did_you_mean(key, places)):
            guess = f"{places[far][0]}.{far}"
        what = "unknown key" if path else "unknown section"
        if guess:
            self._source.fail(here, f"{what}; did you mean {guess!r}?")
        listed = f"; known here: {', '.join(known)}" if len(known) <= 12 else "; see megatron-core's field names"
        listed = listed if known else "; there are none here, leave it out"
        self._source.fail(here, f"{what}{listed}")


def _catalogue() -> tuple[dict[str, list[str]], dict[str, str]]:
    """Where each key that can be set belongs, and why each key that cannot be is decided elsewhere."""
    places: dict[str, list[str]] = {}
    decided: dict[str, str] = {}
    for section, key in _keys(RunConfig, (), decided):
        if section:
            places.setdefault(key, []).append(section)
    return places, decided


def _keys(cls: type, path: KeyPath, decided: dict[str, str]) -> Iterator[tuple[str, str]]:
    for field in dataclasses.fields(cls):
        if "megatron" in field.metadata:
            decided.update(field.metadata["owned"])
            where = path if field.metadata["inline"] else (*path, field.name)
            yield from ((".".join(where), name) for name in sorted(field.metadata["names"]))
            if field.metadata["inline"]:
                continue
        if field.metadata.get("variants") or field.metadata.get("phases"):
            continue
        yield ".".join(path), field.name
        nested = field_hints(cls)[field.name]
        if _section_class(nested):
            yield from _keys(nested, (*path, field.name), decided)


def _section_class(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint) and not is_union(hint)


def _kind(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else show(node.value)


def _syntax(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f":{mark.line + 1}" if mark else ""
    return f"{place}: not readable as YAML: {' '.join(str(error.problem or error.context).split())}"
