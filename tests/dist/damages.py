"""Ways to damage a world of model, data, run and export, and the commands that must notice; see test_malformed.py."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ssu import cli
from megatron_ssu.train.checksums import write_digests
from megatron_ssu.train.run_lock import this_process

Damage = Callable[[Path], object]


def main(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code


def text(name: str, content: str) -> Damage:
    return lambda world: (world / name).write_text(content)


def replace(name: str, old: str, new: str) -> Damage:
    def work(world: Path) -> None:
        content = (world / name).read_text()
        assert old in content
        (world / name).write_text(content.replace(old, new, 1))

    return work


def one(world: Path, pattern: str) -> Path:
    found = sorted(p for p in world.glob(pattern) if p.is_file())
    assert found, pattern
    return max(found, key=lambda p: p.stat().st_size)


def cut(pattern: str, keep: float = 0.6) -> Damage:
    def work(world: Path) -> None:
        file = one(world, pattern)
        os.truncate(file, int(file.stat().st_size * keep))

    return work


def flip(pattern: str, at: float = 0.9) -> Damage:
    def work(world: Path) -> None:
        file = one(world, pattern)
        content = bytearray(file.read_bytes())
        content[int(len(content) * at)] ^= 0x10
        file.write_bytes(content)

    return work


def gone(pattern: str) -> Damage:
    return lambda world: one(world, pattern).unlink()


def garbage(pattern: str) -> Damage:
    return lambda world: one(world, pattern).write_bytes(b"\x00\xff no such thing \x80" * 40)


def config(**changes: object) -> Damage:
    def work(world: Path) -> None:
        file = world / "hf" / "config.json"
        values = json.loads(file.read_text())
        for key, value in changes.items():
            values.pop(key, None) if value is None else values.__setitem__(key, value)
        file.write_text(json.dumps(values))

    return work


def tensors(change: Callable[[dict], object], name: str = "hf/model.safetensors") -> Damage:
    def work(world: Path) -> None:
        loaded = load_file(world / name)
        change(loaded)
        save_file(loaded, world / name, metadata={"format": "pt"})

    return work


def sharded(change: Callable[[Path], object]) -> Damage:
    """The model in two files with an index, then changed."""

    def work(world: Path) -> None:
        loaded = load_file(world / "hf/model.safetensors")
        names = sorted(loaded)
        weight_map = {}
        for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
            file = f"model-{number:05d}-of-00002.safetensors"
            save_file({n: loaded[n] for n in part}, world / "hf" / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(part, file))
        (world / "hf/model.safetensors").unlink()
        (world / "hf/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        change(world / "hf")

    return work


class _Evil:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch evil-was-here",)


def evil(pattern: str) -> Damage:
    return lambda world: one(world, pattern).write_bytes(pickle.dumps(_Evil()))


def evil_torch(pattern: str) -> Damage:
    return lambda world: torch.save({"state": _Evil()}, one(world, pattern))


def resealed(damage: Damage) -> Damage:
    """The checkpoint's digests are those of the damaged files: what else is there to notice it?"""

    def work(world: Path) -> None:
        damage(world)
        write_digests(world / ITER, [])

    return work


def both(*damages: Damage) -> Damage:
    return lambda world: [damage(world) for damage in damages]


def line(name: str, number: int, content: bytes) -> Damage:
    """Line `number` of a text file becomes `content`."""

    def work(world: Path) -> None:
        lines = (world / name).read_bytes().splitlines()
        lines[number - 1] = content
        (world / name).write_bytes(b"\n".join(lines) + b"\n")

    return work


def nothing(world: Path) -> None:
    pass


@dataclass(frozen=True)
class Row:
    name: str
    damage: Damage
    command: str
    words: tuple[str, ...]  # that the line has


FRESH = "train run.yaml checkpoint.directory=new"
RESUME = "train run.yaml checkpoint.directory=begun"
SCORE = "score run.yaml checkpoint.directory=new"
PLAN = "plan run.yaml checkpoint.directory=new shield.scores=run/scores.safetensors"
SHIELDED = "train run.yaml checkpoint.directory=new shield.file=run/shield.safetensors"
VERIFY = "verify --source hf --adapted adapted --shield run/shield.safetensors"
FINISHED = "train run.yaml checkpoint.export=adapted"
ITER = "begun/checkpoints/iter_0000001"


def row(name: str, damage: Damage, command: str, *words: str) -> Row:
    return Row(name, damage, command, words)


def planned(directory: str) -> Damage:
    """A run that has not begun, with a shield of another ratio."""

    def damage(world: Path) -> None:
        (world / directory).mkdir()
        shutil.copy(world / "run" / "scores.safetensors", world / directory)
        assert main("plan", "run.yaml", f"checkpoint.directory={directory}", "shield.ratio=0.25") == 0

    return damage


def seeded(directory: str) -> Damage:
    """A run that has not begun, with the scores and the shield of the run file."""

    def damage(world: Path) -> None:
        (world / directory).mkdir()
        for name in ("scores", "shield"):
            shutil.copy(world / "run" / f"{name}.safetensors", world / directory)

    return damage


def plain(directory: str) -> Damage:
    """An ended run without a shield."""

    def damage(world: Path) -> None:
        assert main("train", "run.yaml", f"checkpoint.directory={directory}", "method.name=none") == 0

    return damage


def retrained(directory: str) -> Damage:
    """The ended run once more at a lower learning rate, which a run may change."""

    def damage(world: Path) -> None:
        options = (f"checkpoint.directory={directory}", "train.optimizer.lr=1e-6")
        assert main("train", "run.yaml", *options) == 0

    return damage


def held_by_another(directory: str) -> Damage:
    """A living job writes there."""

    def damage(world: Path) -> None:
        (world / directory).mkdir(exist_ok=True)
        holder = dataclasses.replace(this_process("train"), host="node7", job="4711")
        (world / directory / "run.lock.1").write_text(json.dumps(asdict(holder)))

    return damage


def bfloat16(loaded: dict) -> None:
    loaded.update({name: tensor.bfloat16() for name, tensor in loaded.items()})
