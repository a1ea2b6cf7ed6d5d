"""How alike sets of instructions are."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from megatron_ssu.drift.similarity import hidden_encoder, read_instructions, sentence_encoder, similarities
from megatron_ssu.errors import UserError
from megatron_ssu.io.atomic import check_writable, write_text


def run(run_file: None, options: argparse.Namespace, console: Console) -> int:
    if len(options.data) < 2 or len(set(options.data)) < len(options.data):
        raise UserError("similarity: needs two sets of instructions or more, each once")
    for name in ("samples", "batch_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, got {getattr(options, name)}")
    if (options.encoder is None) == (options.model is None):
        raise UserError("similarity: give --encoder or --model, one of the two")
    target = check_writable(options.json) if options.json else None
    sets = {path: read_instructions(path, options.samples, options.seed) for path in options.data}
    if options.encoder is not None:
        encode = sentence_encoder(options.encoder, options.batch_size)
    else:
        encode = hidden_encoder(options.model, options.batch_size, options.layer)
    found = similarities({path: encode(texts) for path, texts in sets.items()}, options.seed)
    table = Table("first", "second", "DES", "spread", box=SIMPLE, pad_edge=False)
    for pair in found:
        table.add_row(pair.first, pair.second, f"{pair.value:.4f}", f"{pair.spread:.4f}")
    out = console if console.is_terminal else Console(file=console.file, quiet=console.quiet, width=160)
    out.print(table)
    if target is not None:
        counts = {path: len(texts) for path, texts in sets.items()}
        encoder = {"encoder": options.encoder} if options.encoder else {"model": options.model, "layer": options.layer}
        content = {**encoder, "instructions": counts, "pairs": [asdict(pair) for pair in found]}
        write_text(target, json.dumps(content, indent=1) + "\n")
    return 0
