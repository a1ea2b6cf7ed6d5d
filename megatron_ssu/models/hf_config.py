"""config.json of a Hugging Face directory, and what of it defines the model.

Every key counts, except those that say how the weights are stored, what wrote the file and how the model's code is to run
(`COSMETIC`): a key that nobody here knows may change what the model computes. null is the same as a key that is missing, and
1 the same as 1.0.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ssu.config.coerce import show
from megatron_ssu.errors import UserError
from megatron_ssu.models.hub import local_directory

CONFIG = "config.json"
COSMETIC = frozenset(
    (
        "_name_or_path",
        "_commit_hash",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "use_cache",
        "_attn_implementation",
        "_attn_implementation_internal",
        "attn_implementation",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "torchscript",
    )
)


def read_hf_config(path: str, key: str = "model.path") -> dict[str, Any]:
    """config.json of the Hugging Face directory `path`; `key` is the run file's key or the option that named it."""
    directory = local_directory(path)
    if not path or not directory.is_dir():
        advice = (
            "~ is not expanded" if path.startswith("~") else "give a Hugging Face directory, or a hub id (ORG/NAME)"
        )
        raise UserError(f"{key}: must be a directory, got {show(path)} (looked from {Path.cwd()}); {advice}")
    file = directory / "config.json"
    if not file.exists() and any(
        (directory / name).exists() for name in ("latest_checkpointed_iteration.txt", "metadata.json")
    ):
        raise UserError(
            f"{key}: {path} is a Megatron checkpoint; name the Hugging Face directory of its config.json and tokenizer in "
            "model.hf_path"
        )
    try:
        config = json.loads(file.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{key}: {file} is missing; {path} must be a Hugging Face model directory") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{key}: {file}:{error.lineno}: broken JSON ({error.msg}); copy the file again") from error
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 JSON"
        raise UserError(f"{key}: {file} cannot be read ({reason}); copy the file again") from error
    if not isinstance(config, dict):
        raise UserError(f"{key}: {file} is not a JSON object; copy the file again")
    return config


def normalised(hf: Mapping[str, Any]) -> Any:
    """config.json `hf` as transformers reads it: its own config, with defaults filled in and old keys brought up to date.

    Raises UserError where transformers refuses it.
    """
    return _normalised(json.dumps(dict(hf), sort_keys=True))


@functools.lru_cache(maxsize=8)
def _normalised(text: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**json.loads(text))
    except Exception as error:  # transformers raises many kinds for values that it does not expect
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"config.json: transformers refuses it ({reason}); copy the file again") from error


def definition(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config.json that define the model, with their values, sorted."""
    return {k: _plain(v) for k, v in sorted(config.items()) if k not in COSMETIC and v is not None}


def definition_digest(config: Mapping[str, Any]) -> str:
    """sha256 (hex) over `definition`."""
    return hashlib.sha256(json.dumps(definition(config), sort_keys=True).encode()).hexdigest()


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value in `a`, value in `b`) of all that defines the model and differs between two config.json; sorted."""
    ours, theirs = definition(a), definition(b)
    keys = sorted(ours.keys() | theirs.keys())
    return [(k, ours.get(k), theirs.get(k)) for k in keys if _text(ours.get(k)) != _text(theirs.get(k))]


def weights_part(fingerprint: str) -> str:
    """The part of a fingerprint that covers the weights."""
    return fingerprint.partition(":")[0]


def difference(one: str, other: str) -> str:
    """What differs between two models by their fingerprints, in words; '' where nothing does."""
    names = ("weights", "config.json")
    pairs = zip(names, one.partition(":")[::2], other.partition(":")[::2], strict=True)
    found = [f"{name} ({a[:12] or 'unknown'}, {b[:12] or 'unknown'})" for name, a, b in pairs if a != b]
    return " and ".join(found)


def _text(value: Any) -> str:
    """JSON, in which true is not 1 and NaN equals itself."""
    return json.dumps(value, sort_keys=True)


def _plain(value: Any) -> Any:
    """`value` without nulls in its objects, whole numbers without a decimal point."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
