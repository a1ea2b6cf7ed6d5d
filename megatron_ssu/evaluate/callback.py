"""The section `evaluate` of a run file while it trains: questions asked on the training mesh, rules over what was found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ssu.config.schema import EvaluateSection, RuleSection
from megatron_ssu.engine.random_numbers import kept_generators
from megatron_ssu.engine.ranks import on_rank_zero
from megatron_ssu.evaluate.on_mesh import MeshModel, answered, check_run
from megatron_ssu.evaluate.questions import Questions
from megatron_ssu.evaluate.rules import Figure, better, met, worse_by
from megatron_ssu.train.callbacks.base import Callback
from megatron_ssu.train.latest import write_best

if TYPE_CHECKING:
    from megatron_ssu.train.loop import Loop
    from megatron_ssu.train.trainer import Step

STOP = "evaluate.stop_when"
_SHOWN = ("loss_per_byte", "exact_match", "ended", "in_language", "acc", "acc_norm")  # on the console; all are logged


class Asking(Callback):
    """Asks before the first step, every evaluate.interval steps, and at the end; applies the rules at every evaluation.

    It stands between the validation losses and the checkpoints, which hold what the rules remember.
    """

    def __init__(self, section: EvaluateSection, questions: Questions | None) -> None:
        """`questions`: None where only validation losses are looked at."""
        self._section, self._questions = section, questions
        self._found: dict[str, Figure] = {}  # of this step
        self._best: int | None = None  # iteration whose checkpoint is to be named the best

    def on_evaluation(self, loop: Loop, losses: dict[str, float]) -> None:
        self._found |= {name: Figure(loss, "lower") for name, loss in losses.items()}

    def on_start(self, loop: Loop) -> None:
        if loop.progress.iteration == 0:
            self._ask(loop)
            loop.progress.figures = {"start": {name: figure.value for name, figure in self._found.items()}}
        else:
            self._warn_of_rules_without_start(loop)
        self._found = {}

    def on_step_end(self, loop: Loop, step: Step) -> None:
        if loop.last or (not loop.stop and loop.due(self._section.interval)):
            self._ask(loop)
        if self._found:
            self._apply(loop)
        self._found = {}

    def on_checkpoint(self, loop: Loop, path: Path) -> None:
        if self._best is not None and path == loop.checkpoints.path(self._best):
            best = self._best
            on_rank_zero(lambda: write_best(loop.checkpoints.folder, best))
            self._best = None

    def _ask(self, loop: Loop) -> None:
        """Every figure of the questions, on all ranks alike. Collective; random numbers are as before."""
        if self._questions is None:
            return
        trainer = loop.trainer
        with trainer.times("evaluation"), kept_generators():
            trainer.gather_weights()
            session = replace(trainer.session, run=check_run(trainer.run))
            model = MeshModel("model", trainer.run.model.path, "", session, self._section.batch_size)
            model.mark = lambda: trainer.mark("evaluation")
            found = answered(model, self._questions, session.mesh.rank)
            for chunk in trainer.session.chunks:
                chunk.train()
        figures = {f"evaluate/{m.data}/{m.metric}": m for m in found}
        self._found |= {name: Figure(m.value, m.better) for name, m in figures.items() if m.better is not None}
        iteration = loop.progress.iteration
        loop.telemetry.record(iteration, {name: m.value for name, m in figures.items()})
        shown = [f"{m.data} {m.metric.replace('_', ' ')} {m.value:.4f}" for m in found if m.metric in _SHOWN]
        loop.telemetry.say(f"evaluation {iteration:>5} | " + " | ".join(shown))

    def _apply(self, loop: Loop) -> None:
        state: dict[str, Any] = loop.progress.figures or {}
        start, section = state.get("start", {}), self._section
        if section.best is not None and better(section.best, start, state.get("best"), self._found):
            value = self._found[section.best.figure].value
            loop.progress.figures = state | {"best": value, "best_iteration": loop.progress.iteration}
            loop.save_now, self._best = True, loop.progress.iteration
            loop.telemetry.say(f"best so far: {section.best.figure} {value:.4f}; its checkpoint is kept")
        rule = section.stop_when
        if rule is not None and not loop.last and met(rule, start, self._found):
            lost = worse_by(rule, start, self._found)
            loop.stop = STOP
            loop.telemetry.say(f"{STOP}: {rule.figure} is {lost:.2f} % worse than before the first step")

    def _warn_of_rules_without_start(self, loop: Loop) -> None:
        start = (loop.progress.figures or {}).get("start", {})
        best = self._section.best
        rules: list[tuple[str, RuleSection | None]] = [(STOP, self._section.stop_when)]
        rules.append(("evaluate.best.unless", best.unless if best else None))
        for key, rule in rules:
            if rule is not None and rule.figure not in start:
                loop.telemetry.warn(
                    f"{key}: {rule.figure} was not measured before the first step, so the rule is never met"
                )
