"""Write a Hugging Face model directory in another precision, file by file.

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

from safetensors import SafetensorError

from megatron_ssu.errors import UserError
from megatron_ssu.io.dtypes import TORCH_NAMES
from megatron_ssu.models.hf_config import read_hf_config
from megatron_ssu.models.hf_files import INDEX_FILE, SINGLE_FILE, HFCheckpoint, carry_files


def convert(source: Path, target: Path, dtype: str) -> None:
    """Cast every floating-point tensor of `source`; files, names and index stay.

    Raises:
        UserError: `source` is not a model directory, or `target` exists or cannot be written; nothing is left behind then.
    """
    from megatron_ssu.io.atomic import check_target

    checkpoint = HFCheckpoint(source)
    read_hf_config(str(source), "--source")
    target = check_target(target, "--target")
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(checkpoint, partial, dtype)
        if target.exists():  # an empty directory
            target.rmdir()
        os.replace(partial, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{target}: cannot be written: {reason}; nothing was left behind") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(checkpoint: HFCheckpoint, folder: Path, dtype: str) -> None:
    """All files of the converted model, into `folder`."""
    import torch
    from safetensors.torch import load_file, save_file

    source, wanted = checkpoint.directory, getattr(torch, TORCH_NAMES[dtype])
    for file in sorted({checkpoint.entry(name).file for name in checkpoint.names()}):
        tensors = {k: t.to(wanted) if t.is_floating_point() else t for k, t in load_file(file).items()}
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
        (folder / file.name).chmod(file.stat().st_mode)
    carry_files(source, folder)
    _note_dtype(folder / "config.json", dtype)
    if not (source / SINGLE_FILE).is_file():
        shutil.copyfile(source / INDEX_FILE, folder / INDEX_FILE)
        _fix_index(folder / INDEX_FILE)


def _note_dtype(config: Path, dtype: str) -> None:
    values = json.loads(config.read_text(encoding="utf-8-sig"))
    for key in ("dtype", "torch_dtype"):
        if key in values:
            values[key] = TORCH_NAMES[dtype]
    config.write_text(json.dumps(values, indent=2) + "\n")


def _fix_index(index: Path) -> None:
    values = json.loads(index.read_text(encoding="utf-8"))
    checkpoint = HFCheckpoint(index.parent)
    values.setdefault("metadata", {})["total_size"] = sum(checkpoint.entry(n).nbytes for n in checkpoint.names())
    index.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, metavar="DIR")
    parser.add_argument("--target", type=Path, required=True, metavar="DIR")
    parser.add_argument("--dtype", choices=sorted(TORCH_NAMES), required=True)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # those of libraries
    try:
        convert(options.source, options.target, options.dtype)
    except UserError as error:
        sys.exit(f"convert_dtype: {error}")
