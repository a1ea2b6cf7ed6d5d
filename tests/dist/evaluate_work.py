"""What the ranks of the tests of evaluation do."""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance

from megatron_ssu.commands.evaluate import Named, _open
from megatron_ssu.evaluate.harness import HarnessModel
from megatron_ssu.evaluate.model import Row
from megatron_ssu.evaluate.on_mesh import MeshModel
from tests.dist import work


def instances(kind: str, requests: list[tuple]) -> list[Instance]:
    """Requests as the harness makes them."""
    return [Instance(kind, {}, arguments, number) for number, arguments in enumerate(requests)]


def ask(adapter: Any, requests: dict[str, list[tuple]]) -> dict[str, list[Any]]:
    """What a harness model says to requests by kind."""
    return {kind: getattr(adapter, kind)(instances(kind, own)) for kind, own in requests.items()}


def on_mesh(model: str, parallel: dict[str, Any], requests: dict[str, list[tuple]], rows: list[Row]) -> Any:
    """What a model on the mesh says through the harness' class, and the scores of rows; None but on rank 0."""
    run = work.run_config(model, parallel)
    opened, _ = _open(Named("model", model), run)
    asked = MeshModel("model", model, "", opened, batch_size=2)
    if opened.mesh.rank:
        asked.serve()
        return None
    found = ask(HarnessModel(asked, model), requests), asked.score(rows)
    asked.close()
    return found
