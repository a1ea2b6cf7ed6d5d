"""Compare models: how far weights and hidden states drifted from a base."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_ssu.drift.tables import hidden_table, show, weights_table
from megatron_ssu.drift.weights import WeightDrift, check_alike, compare_weights
from megatron_ssu.errors import UserError
from megatron_ssu.io.atomic import check_folder, check_writable, write_text
from megatron_ssu.io.extras import require
from megatron_ssu.models.source import Source, open_source


def run(run_file: None, options: argparse.Namespace, console: Console) -> int:
    if len(options.models) < 2:
        raise UserError("compare: needs the base and at least one other model, got one directory")
    for name in ("samples", "sequence_length", "micro_batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, got {getattr(options, name)}")
    if options.output:
        require("--output", "matplotlib", "plots")
    target = check_writable(options.json) if options.json else None
    pictures = check_folder(options.output) if options.output else None
    sources = [open_source(path, "compare") for path in options.models]
    check_alike(sources[0], sources[1:])
    hidden = _hidden(options, sources) if options.text else []
    if int(os.environ.get("RANK", "0")) == 0:
        _report(sources, compare_weights(sources[0], sources[1:]), hidden, console, target, pictures)
    return 0


def _hidden(options: argparse.Namespace, sources: list[Source]) -> list[dict[str, Any]]:
    """Drift of hidden states of every model, on the mesh of --run-file. Collective."""
    from megatron_ssu.config.schema import CheckpointSection, ModelSection, PrecisionSection, RunConfig
    from megatron_ssu.data.calibration import load_calibration
    from megatron_ssu.data.tokenizer import load_tokenizer
    from megatron_ssu.drift.hidden import compare_hidden
    from megatron_ssu.engine.mesh import start_processes
    from megatron_ssu.engine.ranks import on_all_ranks
    from megatron_ssu.methods.registry import read_run

    base = sources[0]
    if options.run_file:
        run = read_run(options.run_file)
        run.parallel.transformer.pop("virtual_pipeline_model_parallel_size", None)
    else:
        run = RunConfig(ModelSection(str(base.path)), CheckpointSection("unused"), precision=PrecisionSection("fp32"))
    run.train.micro_batch_size, run.train.global_batch_size = options.micro_batch_size, options.micro_batch_size
    start_processes(run.parallel.timeout_minutes)
    length = min(options.sequence_length, *(source.dims.positions for source in sources))
    length -= length % run.parallel.tensor if run.parallel.sequence_parallel else 0
    text = on_all_ranks(
        lambda: load_calibration(
            options.text,
            load_tokenizer(base.path),
            samples=options.samples,
            sequence_length=length,
            seed=options.seed,
        )
    )
    return [found.to_dict() for found in compare_hidden(run, base, sources[1:], text)]


def _report(
    sources: list[Source],
    weights: WeightDrift,
    hidden: list[dict[str, Any]],
    console: Console,
    target: Path | None,
    pictures: Path | None,
) -> None:
    names = _names(sources)
    tables = weights_table(weights, names)
    tables += [hidden_table(found, names[0], name) for found, name in zip(hidden, names[1:])]
    show(tables, console)
    if target is not None:
        write_text(target, json.dumps(_to_dict(sources, weights, hidden), indent=1) + "\n")
    if pictures is not None:
        from megatron_ssu.drift.plots import draw  # matplotlib is slow to import and a table does not need it

        for path in draw(weights, hidden, names, pictures):
            console.print(f"{path}: drawn", highlight=False, soft_wrap=True)


def _to_dict(sources: list[Source], weights: WeightDrift, hidden: list[dict[str, Any]]) -> dict[str, Any]:
    models = [
        {"path": str(source.path), "weights": found.to_dict(), **({"hidden": hidden[n]} if hidden else {})}
        for n, (source, found) in enumerate(zip(sources[1:], weights.models, strict=True))
    ]
    pairs = [
        {
            "first": str(sources[i + 1].path),
            "second": str(sources[j + 1].path),
            **pair.to_dict(weights.models[i].total, weights.models[j].total),
        }
        for (i, j), pair in weights.pairs.items()
    ]
    return {"base": str(sources[0].path), "models": models, "pairs": pairs}


def _names(sources: list[Source]) -> list[str]:
    """Directories' names; with the directory above, then the whole path, where two have the same."""
    names = [source.name for source in sources]
    longer = [f"{source.path.resolve().parent.name}/{source.name}" for source in sources]
    names = [long if names.count(name) > 1 else name for name, long in zip(names, longer, strict=True)]
    return [str(source.path) if names.count(name) > 1 else name for source, name in zip(sources, names, strict=True)]
