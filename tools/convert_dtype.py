"""Write a Hugging Face model directory in another number format, file by file.

  python tools/convert_dtype.py --source models/Llama-2-13b-chat --target models/Llama-2-13b-chat-bf16 --dtype bf16

A model that is stored in fp16 or fp32 is rounded once, here, and a bf16 run then starts from exactly these weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

from megatron_ssu.errors import UserError

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # names in torch and in config.json


def convert(source: Path, target: Path, dtype: str) -> None:
    """Cast every floating-point tensor of `source`; files, names and index stay.

    Raises:
        UserError: `source` is no model directory, or `target` exists.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from megatron_ssu.models.hf_export import CARRIED
    from megatron_ssu.models.hf_files import HFCheckpoint

    wanted: torch.dtype = getattr(torch, DTYPES[dtype])
    checkpoint = HFCheckpoint(source)
    if target.exists():
        raise UserError(f"{target}: exists already and is not overwritten; name another directory")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in sorted({checkpoint.entry(name).file for name in checkpoint.names()}):
        tensors = {k: t.to(wanted) if t.is_floating_point() else t for k, t in load_file(file).items()}
        save_file(tensors, partial / file.name, metadata={"format": "pt"})
        (partial / file.name).chmod(file.stat().st_mode)
    for pattern in CARRIED:
        for file in source.glob(pattern):
            shutil.copyfile(file, partial / file.name)
    _note_dtype(partial / "config.json", dtype)
    _fix_index(partial)
    os.replace(partial, target)


def _note_dtype(config: Path, dtype: str) -> None:
    values = json.loads(config.read_text())
    for key in ("dtype", "torch_dtype"):
        if key in values:
            values[key] = DTYPES[dtype]
    config.write_text(json.dumps(values, indent=2) + "\n")


def _fix_index(folder: Path) -> None:
    from megatron_ssu.models.hf_files import HFCheckpoint

    for index in folder.glob("*.index.json"):
        values = json.loads(index.read_text())
        checkpoint = HFCheckpoint(folder)
        values.setdefault("metadata", {})["total_size"] = sum(checkpoint.entry(n).nbytes for n in checkpoint.names())
        index.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, metavar="DIR")
    parser.add_argument("--target", type=Path, required=True, metavar="DIR")
    parser.add_argument("--dtype", choices=sorted(DTYPES), required=True)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # those of libraries
    try:
        convert(options.source, options.target, options.dtype)
    except UserError as error:
        sys.exit(f"convert_dtype: {error}")
