"""Language packs: an adaptation as a file that is put on a model, taken off, and stacked with others."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from rich.console import Console

from megatron_ssu.errors import UserError
from megatron_ssu.packs.apply import apply, remove, stack
from megatron_ssu.packs.create import create
from megatron_ssu.shield.pack_file import Pack
from megatron_ssu.shield.verify import verify


def run(run_file: None, options: argparse.Namespace, console: Console) -> int:
    actions = {"create": _create, "apply": _apply, "remove": _remove, "stack": _stack}
    line = actions[options.action](options)
    console.print(line, highlight=False, soft_wrap=True, markup=False)
    return 0


def _create(options: argparse.Namespace) -> str:
    target = Path(options.output)
    if target.exists():
        raise UserError(f"{target}: already exists; remove it or choose another name")
    report = verify(options.source, options.adapted, options.shield)
    if report.status:
        raise UserError(f"{options.adapted}: not packed: {report.verdict} (megatron-ssu verify names what)")
    pack = create(options.source, options.adapted, report.shield, target)
    total = sum(math.prod(matrix.shape) for matrix in report.matrices)
    return (
        f"{target}: {pack.elements:,} of {total:,} weights moved ({pack.elements / total:.1%}), in {len(pack.moved)} tensors; "
        f"{target.stat().st_size:,} bytes"
    )


def _apply(options: argparse.Namespace) -> str:
    pack = Pack(options.pack)
    apply(options.model, pack, options.output)
    return f"{options.output}: {pack.ends['result'].name}, bit for bit"


def _remove(options: argparse.Namespace) -> str:
    pack = Pack(options.pack)
    whole = remove(options.model, pack, options.output)
    if whole:
        return f"{options.output}: {pack.ends['source'].name}, bit for bit"
    return f"{options.output}: {options.model} without {options.pack}; other weights are as they were"


def _stack(options: argparse.Namespace) -> str:
    packs = [Pack(path) for path in options.packs]
    if len(packs) < 2:
        raise UserError("pack stack: needs two packs or more; one is put on by `megatron-ssu pack apply`")
    stack(options.source, packs, options.output)
    return f"{options.output}: {packs[0].ends['source'].name} with " + ", ".join(str(pack.path) for pack in packs)
