"""What ties a checkpoint to its run file, and what may change between them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ssu.config.schema import RegularizeSection, RunConfig
from megatron_ssu.errors import UserError
from megatron_ssu.methods.base import Method
from megatron_ssu.methods.training_facts import section_facts, shown, training_facts
from megatron_ssu.models.hf_config import definition, read_hf_config, weights_part
from megatron_ssu.shield.shield_file import Shield

_MODEL = ("model.path (", "model.make_vocab_size_divisible_by", "precision.dtype")  # what decides how weights are read
METHOD, _METHOD = "method.name", "method."
SHIELD = "shield.file (its digest)"


@dataclass(frozen=True)
class Identity:
    """Run-file key -> value of all that must not change between a checkpoint and the run that resumes from it."""

    facts: dict[str, Any]

    def compare(self, saved: dict[str, Any], path: Path, *, free: tuple[str, ...] = ()) -> None:
        """Raises UserError naming the first key that differs; those that begin with one of `free` may."""
        for key in sorted(self.facts.keys() | saved.keys(), key=lambda key: (key != METHOD, key)):
            was, now = saved.get(key), self.facts.get(key)
            if was == now or key.startswith(free):
                continue
            advice = "change it back, or start in another checkpoint.directory"
            raise UserError(f"{path}: {key} was {shown(was)} in this checkpoint and is {shown(now)} now; {advice}")

    def compare_method(self, saved: dict[str, Any], path: Path) -> None:
        """Raises UserError where the checkpoint at `path`, which has these facts, is of another method or other options."""
        own = {key: value for key, value in self.facts.items() if key.startswith(_METHOD)}
        Identity(own).compare({key: value for key, value in saved.items() if key.startswith(_METHOD)}, path)

    def compare_model(self, saved: dict[str, Any], path: Path) -> None:
        """Raises UserError where the weights of the checkpoint at `path` are not those of the run's model and precision."""
        model = {key: value for key, value in self.facts.items() if key.startswith(_MODEL)}
        Identity(model).compare({key: value for key, value in saved.items() if key.startswith(_MODEL)}, path)

    def digest(self) -> str:
        """sha256 (hex) that stands for all facts."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()


def identity_of(run: RunConfig, method: Method, shield: Shield, train_digests: Sequence[str]) -> Identity:
    """The facts of a run of a method under a shield, on training data whose indexed datasets have these digests."""
    facts = model_facts(run, shield.fingerprint)
    facts |= {
        SHIELD: shield.digest(),
    }
    facts |= training_facts(run, train_digests)
    facts |= method_facts(method)
    facts |= section_facts("train.regularize", regularize_facts(run.train.regularize))
    return Identity(facts)


def method_facts(method: Method) -> dict[str, Any]:
    """The facts that say what a method has done to a checkpoint's weights, beside its shield."""
    return {METHOD: method.name, **section_facts(f"{_METHOD}{method.name}", method.identity())}


def regularize_facts(section: RegularizeSection) -> dict[str, Any]:
    """What counts of the section: nothing of a regularizer that is left out."""
    facts: dict[str, Any] = {"l2": section.l2} if section.l2 else {}
    return facts | ({"kl": section.kl, "kl_temperature": section.kl_temperature} if section.kl else {})


def model_facts(run: RunConfig, fingerprint: str) -> dict[str, Any]:
    """The facts that say whose weights a checkpoint holds and in which precision, for the model of this fingerprint."""
    facts: dict[str, Any] = {
        "model.path (its weights' fingerprint)": weights_part(fingerprint),
        "model.make_vocab_size_divisible_by": run.model.make_vocab_size_divisible_by,
        "precision.dtype": run.precision.dtype,
    }
    config = definition(read_hf_config(run.model.path))
    return facts | {f"model.path (its config.json: {key})": value for key, value in config.items()}
