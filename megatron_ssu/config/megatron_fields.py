"""megatron-core's configuration dataclasses as a schema, read from their source.

Importing them takes seconds, since it imports torch and most of megatron-core; a command that reads a run file needs the
names and types of their fields only.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import typing
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from megatron_ssu.config.coerce import field_hint

# Names that annotations may use and still be resolved without an import of megatron-core.
_PLAIN: dict[str, Any] = {
    **{t.__name__: t for t in (bool, int, float, str, list, tuple, dict)},
    **{n: getattr(typing, n) for n in ("Any", "Callable", "Dict", "List", "Literal", "Optional", "Tuple", "Union")},
    "__builtins__": {},
}


@dataclass(frozen=True)
class MegatronClass:
    """The dataclass `name` of the module megatron.core.`module`, whose dataclass base is `base`."""

    module: str
    name: str
    base: MegatronClass | None = None

    @cached_property
    def _own(self) -> dict[str, ast.AnnAssign]:
        for node in _source(self.module).body:
            if isinstance(node, ast.ClassDef) and node.name == self.name:
                statements = [s for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)]
                return {s.target.id: s for s in statements}  # type: ignore[union-attr]
        raise RuntimeError(f"megatron.core.{self.module} has no class {self.name}")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Its fields, those of `base` first."""
        return tuple(dict.fromkeys([*(self.base.names if self.base else ()), *self._own]))

    def hint(self, name: str) -> Any:
        """The resolved annotation of a field, `X | None` where the default is None."""
        statement = self._own.get(name)
        if statement is None and self.base is not None:
            return self.base.hint(name)
        assert statement is not None, f"{self.name} has no field {name}"
        default = statement.value
        try:
            found = eval(ast.unparse(statement.annotation), dict(_PLAIN))
            if isinstance(found, str):
                raise NameError(found)  # a quoted annotation
            return found | None if isinstance(default, ast.Constant) and default.value is None else found
        except Exception:  # a class of megatron's or torch's
            return field_hint(self.load(), next(f for f in dataclasses.fields(self.load()) if f.name == name))

    def load(self) -> type:
        """The class itself; imports megatron-core."""
        return getattr(importlib.import_module(f"megatron.core.{self.module}"), self.name)


@cache
def _source(module: str) -> ast.Module:
    spec = importlib.util.find_spec("megatron.core")
    if spec is None or spec.origin is None:
        raise RuntimeError("megatron-core is not installed; pip install megatron-core")
    return ast.parse((Path(spec.origin).parent / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))


MODEL_PARALLEL = MegatronClass("model_parallel_config", "ModelParallelConfig")
TRANSFORMER = MegatronClass("transformer.transformer_config", "TransformerConfig", MODEL_PARALLEL)
OPTIMIZER = MegatronClass("optimizer.optimizer_config", "OptimizerConfig")
DDP = MegatronClass("distributed.distributed_data_parallel_config", "DistributedDataParallelConfig")
