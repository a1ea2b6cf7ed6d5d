"""Tasks of lm-evaluation-harness, asked of any model here. Imported only where tasks are named: the harness is an extra."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows
from transformers import AutoTokenizer

from megatron_ssu.errors import UserError, named_line
from megatron_ssu.evaluate.measured import Measured
from megatron_ssu.evaluate.model import Model, Row
from megatron_ssu.models.hub import local_directory

VERSION = lm_eval.__version__


@dataclass(frozen=True)
class TaskOptions:
    """The options that the harness takes beside the tasks."""

    tasks: tuple[str, ...]  # names, or task files (.yaml)
    include: str | None = None  # a folder of task files, whose tasks have names
    fewshot: int | None = None  # None: as each task says
    limit: int | None = None  # questions of each task
    chat_template: bool = False


class HarnessModel(TemplateLM):
    """The harness' view of a model. Texts become tokens as in the harness' own class for transformers."""

    def __init__(self, model: Model, tokenizer_path: str | Path) -> None:
        super().__init__()
        self._model = model
        self.tokenizer: Any = AutoTokenizer.from_pretrained(local_directory(tokenizer_path), local_files_only=True)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def max_length(self) -> int:
        return self._model.positions

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **special))

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows = [
            Row((context + continuation)[-(self.max_length + 1) :], min(len(continuation), self.max_length))
            for _, context, continuation in requests
        ]
        return [(score.logprob, score.greedy) for score in self._model.score(rows)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        rows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for context, predicted in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                rows.append(Row([*context, predicted[-1]], len(predicted)))
                owners.append(number)
        found = [0.0] * len(requests)
        for owner, score in zip(owners, self._model.score(rows), strict=True):
            found[owner] += score.logprob
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        found: dict[int, str] = {}
        kinds: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(repr(request.args[1]), []).append(number)
        for members in kinds.values():
            options: dict[str, Any] = dict(normalize_gen_kwargs(dict(requests[members[0]].args[1]), 256))
            if options.get("do_sample"):
                raise UserError(
                    f"--tasks: {requests[members[0]].task_name} samples its answers; only greedy ones are made"
                )
            limit = options["max_gen_toks"]
            until = handle_stop_sequences(options.get("until"), eos=self.tokenizer.decode(self.eot_token_id))
            room = self.max_length - limit
            if room < 1:
                raise UserError(
                    f"--tasks: {requests[members[0]].task_name} asks for {limit} tokens, the model has {self.max_length} "
                    "positions"
                )
            prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in members]
            for i, ids in zip(members, self._model.answer(prompts, limit, self._stop(until)), strict=True):
                found[i] = postprocess_generated_text(self._text(ids), until, None)
        return [found[i] for i in range(len(requests))]

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _stop(self, until: Sequence[str]) -> Any:
        return lambda ids: any(term in self._text(ids) for term in until if term)


def check_tasks(options: TaskOptions) -> None:
    """Raises UserError for a name that the harness does not know, or a task file that is not there."""
    for task in options.tasks:
        if _is_file(task) and not Path(task).is_file():
            raise UserError(f"--tasks: {task}: no such file")
    manager = _manager(options)
    for task in options.tasks:
        if not _is_file(task) and not manager.match_tasks([task]):
            raise UserError(
                f"--tasks: {task!r} is not a task of lm-evaluation-harness {VERSION}; see `lm-eval ls tasks`"
            )


def run_tasks(model: Model, options: TaskOptions, tokenizer_path: str | Path) -> list[Measured]:
    """All metrics of all tasks. Raises UserError where the harness cannot run one, such as data that cannot be fetched."""
    adapter = HarnessModel(model, tokenizer_path)
    tasks: list[Any] = [str(Path(task).absolute()) if _is_file(task) else task for task in options.tasks]
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            results = simple_evaluate(
                model=adapter,
                tasks=tasks,
                num_fewshot=options.fewshot,
                limit=options.limit,
                bootstrap_iters=0,
                apply_chat_template=options.chat_template,
                task_manager=_manager(options),
            )
    except UserError:
        raise
    except Exception as error:  # tasks are code and data of others
        raise UserError(f"--tasks: {', '.join(options.tasks)}: the harness failed ({named_line(error)})") from error
    assert results is not None
    return _measured(results)


@cache
def _manager(options: TaskOptions) -> TaskManager:
    """The harness' own thousands of tasks are only looked through where a task is not one of the user's files."""
    own = TaskManager(include_path=options.include, include_defaults=False)
    if all(_is_file(task) or own.match_tasks([task]) for task in options.tasks):
        return own
    return TaskManager(include_path=options.include)


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _measured(results: Any) -> list[Measured]:
    found = []
    for task, values in results["results"].items():
        better = results["higher_is_better"].get(task, {})
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or not filtered:
                continue
            name = metric if filtered == "none" else f"{metric},{filtered}"
            direction = {True: "higher", False: "lower", None: None}[better.get(metric)]
            samples = _items(results.get("samples", {}).get(task, []), metric, filtered, float(value))
            facts = {"version": results["versions"].get(task), "fewshot": results.get("n-shot", {}).get(task)}
            counted = [1.0] * len(samples)
            found.append(Measured(task, name, float(value), direction, samples, counted, facts))
    return found


def _items(samples: list[dict[str, Any]], metric: str, filtered: str, value: float) -> list[float]:
    """The metric of every question, where their mean is the task's figure; else none."""
    own = [s[metric] for s in samples if s.get("filter", "none") == filtered and isinstance(s.get(metric), int | float)]
    return [float(v) for v in own] if own and abs(sum(own) / len(own) - value) < 1e-9 else []
