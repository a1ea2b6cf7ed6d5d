"""Who imports whom: rooms import downwards only, nothing goes round in circles, and small commands load no engine."""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import megatron_ssu
from megatron_ssu.cli import _parser

ROOT = Path(megatron_ssu.__file__).parent
FLOORS = (
    "errors",
    "io",
    "engine",
    "config",
    "ops",
    "models",
    "data",
    "scoring",
    "shield",
    "packs",
    "compact",
    "adapters",
    "methods",
    "estimate",
    "train",
    "drift",
    "generate",
    "evaluate",
    "report",
    "commands",
    ("cli", "api"),
    "__main__",
)
HEIGHT = {
    room: height for height, rooms in enumerate(FLOORS) for room in ((rooms,) if isinstance(rooms, str) else rooms)
}
# What answers from small files, and so within a second. (`megatron` alone is a namespace that is looked for, not loaded.)
LIGHT = (
    "shield",
    "packs",
    "scoring.scores_file",
    "methods.registry",
    *(f"commands.{c}" for c in ("verify", "inspect", "compose", "pack")),
)
HEAVY = ("torch.distributed", "megatron.core", "transformers")


def _modules() -> dict[str, Path]:
    """Modules of the package by their names within it; the package itself is ''."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _statements(body: list[ast.stmt], inside: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import statement, and whether it runs only when a function is called; those for type checkers left out."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, inside
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from _statements(node.orelse, inside)
        else:
            within = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for block in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, block, []), within)
            for part in (*getattr(node, "handlers", []), *getattr(node, "cases", [])):
                yield from _statements(part.body, within)


def _imports(module: str, *, lazy: bool) -> set[str]:
    """Modules of the package that `module` imports when loaded; with `lazy` also those that its functions do."""
    found = set()
    for node, inside in _statements(ast.parse(MODULES[module].read_text(encoding="utf-8")).body):
        if inside and not lazy:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [alias.name for alias in node.names]
        for name in names:
            if name.split(".")[0] != "megatron_ssu":
                continue
            inner = name.removeprefix("megatron_ssu").removeprefix(".")
            found.add(inner if inner in MODULES else inner.rpartition(".")[0])
    return found - {""}


def _room(module: str) -> str:
    return module.split(".")[0]


def test_every_room_has_a_place():
    assert {_room(module) for module in MODULES if module} <= set(HEIGHT)


@pytest.mark.parametrize("module", sorted(filter(None, MODULES)))
def test_nothing_imports_upwards(module):
    above = {
        other
        for other in _imports(module, lazy=True)
        if _room(other) != _room(module) and HEIGHT[_room(other)] >= HEIGHT[_room(module)]
    }
    assert not above


def _circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that are on a circle or above one; none where there is no circle."""
    while graph:
        done = {module for module, needed in graph.items() if not needed & graph.keys()}
        if not done:
            return sorted(graph)
        graph = {module: needed for module, needed in graph.items() if module not in done}
    return []


def test_nothing_goes_round_in_circles():
    assert not _circle({module: _imports(module, lazy=True) for module in MODULES})
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_light_modules_load_neither_megatron_nor_torch_distributed():
    light = sorted(m for m in MODULES if any(m == name or m.startswith(name + ".") for name in LIGHT))
    assert len(light) > len(LIGHT)
    program = (
        "import importlib, sys\n"
        f"for name in {light!r}:\n"
        "    importlib.import_module('megatron_ssu.' + name)\n"
        f"    heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "    assert not heavy, f'{name} loads {heavy}'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_an_extra_that_a_message_names_is_there() -> None:
    project = (ROOT.parent / "pyproject.toml").read_text()
    section = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
    calls = [
        node
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require"
    ]
    named = {argument.value for call in calls for argument in call.args[2:] if isinstance(argument, ast.Constant)}
    assert len(calls) > 5 and named <= extras


def test_no_option_begins_one_of_torchrun() -> None:
    """torchrun takes it for its own, by its beginning, wherever it stands."""
    theirs = {option for action in get_args_parser()._actions for option in action.option_strings}
    commands = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    ours = {
        (name, option)
        for name, command in commands.items()
        for action in command._actions
        for option in action.option_strings
        if option not in ("-h", "--help")
    }
    assert len(ours) > 20
    assert not {(name, option) for name, option in ours if any(other.startswith(option) for other in theirs)}
