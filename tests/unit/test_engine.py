"""What the engine takes from megatron-core and torch is there and as it was; nothing else names their private parts."""

from __future__ import annotations

import ast
import importlib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import megatron_ssu
from megatron_ssu.engine import cpu_backend
from megatron_ssu.engine.private_names import NAMES, PrivateName, signature

PACKAGE = Path(megatron_ssu.__file__).parent
OWNERS = ("torch", "megatron", "transformer_engine", "apex")
# Private members of other things: of Python, and of an object of the same module.
ALLOWED = {"os._exit", "sys._current_frames", "lock._forget", "moved._move", "gather._check", "gather._torch"}


def in_this_version(entry: PrivateName) -> bool:
    return SpecifierSet(entry.megatron).contains(metadata.version("megatron-core"), prereleases=True)


@pytest.mark.parametrize("entry", NAMES, ids=lambda entry: entry.path + entry.megatron)
def test_a_private_name_is_what_the_engine_takes_it_for(entry):
    module, _, user = entry.used_by.partition(":")
    assert hasattr(importlib.import_module(f"megatron_ssu.engine.{module}"), user), (
        f"no {entry.used_by} uses {entry.path}"
    )
    if not in_this_version(entry):
        pytest.skip(f"megatron-core {entry.megatron}")
    try:
        found = signature(cpu_backend.stock(entry.path))
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{entry.path} is gone; {entry.used_by} uses it ({error})")
    assert found == entry.parameters, f"{entry.path} takes ({found}); {entry.used_by} expects ({entry.parameters})"


def test_the_cpu_backend_replaces_what_is_listed():
    listed = {entry.path for entry in NAMES if entry.used_by == "cpu_backend:install_cpu_backend"}
    assert set(cpu_backend.replaced_names()) == listed


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_uses(tree: ast.AST) -> list[str]:
    """Imports, attributes and getattr's strings that begin with an underscore and belong to no object of our own."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found += [n for n in names if n.split(".")[0] in OWNERS and any(private(p) for p in n.split("."))]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.split(".")[0] in OWNERS and not node.level:
                names = [f"{module}.{alias.name}" for alias in node.names]
                found += [n for n in names if any(private(p) for p in n.split("."))]
        elif isinstance(node, ast.Attribute) and private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "delattr", "hasattr"):
            owner, name = node.args[:2]
            if isinstance(name, ast.Constant) and private(name.value) and ast.unparse(owner) not in ("self", "cls"):
                found.append(f"{ast.unparse(owner)}.{name.value}")
    return [name for name in found if name not in ALLOWED]


def test_private_names_are_used_in_the_engine_alone():
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        place = file.relative_to(PACKAGE).as_posix()
        if not place.startswith("engine/"):
            found += [f"{place}: {name}" for name in private_uses(ast.parse(file.read_text()))]
    assert not found, found


@pytest.mark.parametrize(
    "code, name",
    [
        ("from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING", "_MEM_FORMAT_ENCODING"),
        ("from torch.utils._pytree import tree_leaves", "_pytree"),
        ("import torch._dynamo", "_dynamo"),
        ("torch._foreach_mul_(tensors, 2)", "_foreach_mul_"),
        ("super()._build(x)", "_build"),
        ("setattr(module, '_forward_impl', f)", "_forward_impl"),
    ],
)
def test_a_private_use_is_seen(code, name):
    (found,) = private_uses(ast.parse(code))
    assert name in found
    assert not private_uses(
        ast.parse("self._x = cls._y(a.b.__dict__, getattr(self, '_z'))\nfrom megatron_ssu import _C")
    )


def test_the_engine_imports_nothing_above_it():
    for file in (PACKAGE / "engine").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron_ssu":
                assert node.module.split(".")[1] in ("errors", "io", "engine"), file
