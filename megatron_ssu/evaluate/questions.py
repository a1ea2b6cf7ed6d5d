"""All that models are asked: texts, chats and tasks, read once and asked of every model alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ssu.config.schema import EvaluateSection
from megatron_ssu.errors import UserError
from megatron_ssu.evaluate.chats import Chats, answer_chats, answers_as_jsonl, measure_chats, read_chats
from megatron_ssu.evaluate.languages import Identify, identifier
from megatron_ssu.evaluate.measured import Measured
from megatron_ssu.evaluate.model import Model
from megatron_ssu.evaluate.texts import Texts, measure_texts, read_texts
from megatron_ssu.io.extras import require

if TYPE_CHECKING:
    from megatron_ssu.evaluate.harness import TaskOptions

Keep = Callable[[Chats, str], None]  # is given a model's answers as JSON lines


@dataclass(frozen=True)
class Questions:
    """See `read_questions`."""

    section: EvaluateSection
    texts: list[Texts]
    chats: list[Chats]
    tasks: TaskOptions | None
    identify: Identify

    def measure(
        self, model: Model, tokenizer_path: str | Path, keep: Keep = lambda chats, lines: None
    ) -> list[Measured]:
        """Everything of one model, whose tokenizer is in a directory."""
        section, found = self.section, []
        for texts in self.texts:
            found += measure_texts(model, texts, section.sequence_length)
        for chats in self.chats:
            answers = answer_chats(model, chats, section.max_new_tokens)
            keep(chats, answers_as_jsonl(chats, answers))
            facts = {"max_new_tokens": section.max_new_tokens, "identifier": section.identifier}
            found += measure_chats(chats, answers, self.identify, facts)
        if self.tasks is not None:
            from megatron_ssu.evaluate.harness import run_tasks

            found += run_tasks(model, self.tasks, tokenizer_path)
        return found


def read_questions(section: EvaluateSection) -> Questions:
    """Read all that is asked. Raises UserError where it cannot be read."""
    identify = identifier(section.identifier)
    tasks = None
    if section.tasks:
        require("tasks", "lm_eval", "evaluate")
        from megatron_ssu.evaluate.harness import TaskOptions, check_tasks

        tasks = TaskOptions(
            tuple(section.tasks), section.task_path, section.fewshot, section.limit, section.chat_template
        )
        check_tasks(tasks)
    texts = [read_texts(name, path, section.limit) for name, path in section.texts.items()]
    chats = [read_chats(name, path, section.limit) for name, path in section.chats.items()]
    both = section.texts.keys() & section.chats.keys()
    if both:
        raise UserError(f"evaluate: texts and chats are both called {min(both)}; name them apart")
    return Questions(section, texts, chats, tasks, identify)
