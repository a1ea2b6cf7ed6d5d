"""Evaluate models side by side: what was kept, and what was learnt."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_ssu import __version__
from megatron_ssu.config.schema import EvaluateSection
from megatron_ssu.errors import UserError
from megatron_ssu.evaluate.chats import Chats
from megatron_ssu.evaluate.questions import Keep, Questions, read_questions
from megatron_ssu.evaluate.results import ModelResult, show, to_jsonl
from megatron_ssu.io.atomic import check_folder, check_writable, write_text

_RUN = re.compile(r"(.+?)(?:@(\d+))?")


@dataclass(frozen=True)
class Named:
    """A model of the command line: a Hugging Face directory or hub id, or a run's checkpoint."""

    name: str
    path: str
    run: Path | None = None  # the run file, for a checkpoint
    iteration: int | None = None  # of the checkpoint; None: the newest


def run(run_file: None, options: argparse.Namespace, console: Console) -> int:
    models = [named(text) for text in options.models]
    _check_names(models)
    target = check_writable(options.output) if options.output else None
    folder = check_folder(options.answers) if options.answers else None
    first = int(os.environ.get("RANK", "0")) == 0
    questions = read_questions(section_of(options))
    if not all(model.run for model in models):
        join_ranks(options)
    versions, results = versions_of(questions), []
    for model in models:
        if first:
            console.print(f"evaluating {model.name}: {model.path}", highlight=False, soft_wrap=True)

        def keep(chats: Chats, lines: str, name: str = model.name) -> None:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                write_text(folder / f"{name}-{chats.name}.jsonl".replace("/", "_"), lines)

        results.append(evaluated(model, options, questions, keep))
        if first and target is not None:
            write_text(target, to_jsonl(results, versions))
    if first:
        wide = console if console.is_terminal else Console(file=console.file, quiet=console.quiet, width=200)
        show(results, wide)
        if target is not None:
            console.print(f"{target}: written", highlight=False, soft_wrap=True)
    return 0


def join_ranks(options: argparse.Namespace) -> None:
    """Join the ranks of --run-file's mesh. Raises UserError under torchrun without one."""
    if options.run_file is not None:
        from megatron_ssu.engine.mesh import start_processes
        from megatron_ssu.methods.registry import read_run

        start_processes(read_run(options.run_file).parallel.timeout_minutes)
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "--run-file: missing; under torchrun models are evaluated on a mesh: name a run file that has it under parallel"
        )


def named(text: str) -> Named:
    """NAME=MODEL or MODEL: a directory, a hub id, a run's directory or run file, of an iteration with @N."""
    name, separator, path = text.partition("=")
    if not separator:
        name, path = "", text
    place = _RUN.fullmatch(path)
    assert place is not None
    base, iteration = Path(place[1]), place[2]
    run_file = base if base.suffix in (".yaml", ".yml") else base / "run.yaml"
    label = name or (base.stem if base.suffix in (".yaml", ".yml") else base.name) or path
    if run_file.is_file() and not (base / "config.json").is_file():
        return Named(label, path, run_file, None if iteration is None else int(iteration))
    return Named(label, path)


def _check_names(models: list[Named]) -> None:
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"evaluate: two models are called {name}; write NAME=MODEL")


def section_of(options: argparse.Namespace) -> EvaluateSection:
    """The options as the section of a run file that says the same. Raises UserError where nothing is asked."""
    for name in ("max_new_tokens", "batch_size", "sequence_length", "limit"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, got {getattr(options, name)}")
    given = {f.name: getattr(options, f.name) for f in fields(EvaluateSection) if hasattr(options, f.name)}
    tasks = [task for names in options.tasks or [] for task in names.split(",") if task]
    files = {kind: _files(getattr(options, kind) or []) for kind in ("texts", "chats")}
    section = EvaluateSection(**given | files | {"tasks": tasks})
    if not section.asks:
        raise UserError(f"{options.command}: nothing to measure; name --texts, --chats or --tasks")
    return section


def _files(given: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, path in map(_file, given):
        if name in found:
            raise UserError(f"evaluate: two files are called {name}; write NAME=FILE")
        found[name] = path
    return found


def _file(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    return (name, path) if separator else (Path(text).name.split(".")[0], text)


def evaluated(model: Named, options: argparse.Namespace, questions: Questions, keep: Keep) -> ModelResult:
    if model.run is None and options.run_file is None:
        import transformers

        from megatron_ssu.evaluate.hugging_face import HuggingFaceModel

        opened = HuggingFaceModel(model.name, model.path, dtype=options.dtype, batch_size=options.batch_size)
        measured = questions.measure(opened, model.path, keep)
        opened.close()
        return ModelResult(
            model.name, model.path, opened.fingerprint, f"transformers {transformers.__version__}", measured
        )
    return _on_mesh(model, options, questions, keep)


def _on_mesh(model: Named, options: argparse.Namespace, questions: Questions, keep: Keep) -> ModelResult:
    """On the run file's mesh; rank 0 asks, the others serve. Collective."""
    from megatron.core import __version__ as core

    from megatron_ssu.engine.mesh import start_processes
    from megatron_ssu.evaluate.on_mesh import MeshModel, answered
    from megatron_ssu.methods.registry import read_run

    run = read_run(options.run_file or str(model.run))
    start_processes(run.parallel.timeout_minutes)
    parallel, fingerprint = _open(model, run)
    opened = MeshModel(model.name, model.path, fingerprint, parallel, options.batch_size)
    mesh = parallel.mesh
    del parallel
    measured = answered(opened, questions, mesh.rank, keep)
    return ModelResult(model.name, model.path, fingerprint, f"megatron-core {core} on {mesh}", list(measured))


def _open(model: Named, run: Any) -> tuple[Any, str]:
    """The model on the mesh, and its fingerprint. Collective."""
    from megatron_ssu.commands.export import load_exported
    from megatron_ssu.engine.ranks import on_all_ranks, on_rank_zero
    from megatron_ssu.evaluate.on_mesh import check_run
    from megatron_ssu.methods.registry import read_run
    from megatron_ssu.models.fingerprint import model_fingerprint
    from megatron_ssu.models.parallel_model import open_model
    from megatron_ssu.models.source import open_source
    from megatron_ssu.train.checkpoints import Checkpoints
    from megatron_ssu.train.checksums import digest_of_all
    from megatron_ssu.train.regularizers import forward_run

    run = on_all_ranks(lambda: check_run(forward_run(run)))
    if model.run is not None:
        own = read_run(str(model.run))
        own = check_run(forward_run(replace(own, parallel=run.parallel)))
        parallel, iteration = load_exported(own, model.iteration)
        path = Checkpoints(own.checkpoint.directory).path(iteration)
        return parallel, on_rank_zero(lambda: f"checkpoint:{digest_of_all(path)}")
    run = replace(run, model=replace(run.model, path=model.path))
    source = on_all_ranks(lambda: open_source(model.path, "evaluate"))
    return open_model(run, source), on_rank_zero(lambda: model_fingerprint(model.path, "evaluate"))


def versions_of(questions: Questions) -> dict[str, str]:
    import torch

    versions = {"megatron-ssu": __version__, "torch": torch.__version__}
    if questions.tasks is not None:
        from megatron_ssu.evaluate.harness import VERSION

        versions["lm-eval"] = VERSION
    return versions
