"""Models of the Hugging Face hub: where a directory is asked for, `ORG/NAME` or `ORG/NAME@REVISION` will do.

huggingface_hub downloads into its own cache, and its environment variables hold (HF_HOME, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE). A reference is pinned once, to `ORG/NAME@COMMIT`; from then on it stands for a directory of the cache, whatever
the branch does.
"""

from __future__ import annotations

import json
import os
import re
import sys
from fnmatch import fnmatch
from pathlib import Path

from megatron_ssu.errors import UserError

_REFERENCE = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CACHED = re.compile(r"models--.+?--(.+)")
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# What belongs to a model beside its weights.
_SMALL = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")
_TEMPLATES = "additional_chat_templates/*.jinja"


def is_reference(path: str) -> bool:
    """Whether `path` can only be a hub id: it has an id's form, and neither it nor the folder that it would lie in is there."""
    return _REFERENCE.fullmatch(path) is not None and not Path(path).exists() and not Path(path).parent.is_dir()


def is_pinned(path: str) -> bool:
    """Whether `path` is a hub id with the commit that it stands for."""
    return is_reference(path) and bool(_COMMIT.fullmatch(parts(path)[1] or ""))


def parts(reference: str) -> tuple[str, str | None]:
    """The id and the revision of a reference; without a revision None."""
    name, _, revision = reference.partition("@")
    return name, revision or None


def local_directory(path: str | Path) -> Path:
    """The directory that `path` stands for: that of a pinned reference in the cache, else itself."""
    if not is_pinned(str(path)):
        return Path(path)
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    name, commit = parts(str(path))
    folder = repo_folder_name(repo_id=name, repo_type="model")
    return Path(constants.HF_HUB_CACHE) / folder / "snapshots" / str(commit)


def model_name(directory: str | Path) -> str:
    """What files and messages call a model: its directory's name, or that of the hub."""
    path = local_directory(directory).resolve()
    if path.parent.name == "snapshots" and (cached := _CACHED.fullmatch(path.parent.parent.name)):
        return cached[1]
    return path.name


def pin(reference: str, key: str) -> str:
    """`ORG/NAME@COMMIT` of a reference; asks the hub, or the cache where it cannot be reached or HF_HUB_OFFLINE is set.

    Raises UserError, naming `key`, where there is no such model or revision, it cannot be read, or the hub cannot be reached.
    """
    if is_pinned(reference):
        return reference
    from huggingface_hub import hf_hub_download

    name, revision = parts(reference)
    with _errors(reference, key):
        return f"{name}@{Path(hf_hub_download(name, 'config.json', revision=revision)).parent.name}"


def download(pinned: str, key: str, *, weights: bool = True) -> Path:
    """Bring what a pinned reference lacks into the cache; its directory there. Without `weights` all but these.

    Raises UserError, naming `key`, as `pin` does, and for a model without safetensors files.
    """
    directory = local_directory(pinned)
    try:
        with _errors(pinned, key):
            return _download(pinned, key, weights)
    except UserError:
        if _is_there(directory, weights):
            return directory  # nothing that the hub says changes a commit
        raise


def _download(pinned: str, key: str, weights: bool) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    name, commit = parts(pinned)
    files = [sibling.rfilename for sibling in HfApi().model_info(name, revision=commit).siblings or []]
    wanted = [f for f in files if ("/" not in f and any(fnmatch(f, p) for p in _SMALL)) or fnmatch(f, _TEMPLATES)]
    if weights and _SINGLE in files:
        wanted.append(_SINGLE)
    elif weights and _INDEX in files:
        index = json.loads(Path(hf_hub_download(name, _INDEX, revision=commit)).read_text(encoding="utf-8"))
        wanted += sorted(set(index["weight_map"].values()))
    elif weights:
        raise UserError(
            f"{key}: {name} has no {_SINGLE} or {_INDEX} at {str(commit)[:12]}; weights must be safetensors"
        )
    return Path(snapshot_download(name, revision=commit, allow_patterns=wanted))


def _is_there(directory: Path, weights: bool) -> bool:
    """Whether config, and with `weights` all of these, are in a directory of the cache, whose files are whole."""
    if not (directory / "config.json").is_file() or not weights:
        return (directory / "config.json").is_file()
    if (directory / _SINGLE).is_file() or not (directory / _INDEX).is_file():
        return (directory / _SINGLE).is_file()
    try:
        index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
        return all((directory / file).is_file() for file in set(index["weight_map"].values()))
    except (ValueError, KeyError, AttributeError):
        return False


class _errors:
    """Talking to the hub: bars on a terminal alone, and what goes wrong as a UserError of one line."""

    def __init__(self, reference: str, key: str) -> None:
        self.reference, self.key = reference, key

    def __enter__(self) -> None:
        from huggingface_hub.utils import disable_progress_bars
        from huggingface_hub.utils.logging import set_verbosity_error

        set_verbosity_error()  # it warns of every attempt; the last one is reported
        if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
            disable_progress_bars()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        from huggingface_hub import constants, errors

        if error is None or isinstance(error, UserError):
            return
        if not isinstance(error, OSError | errors.HTTPError | errors.HfHubHTTPError | errors.HFValidationError):
            return
        name, revision = parts(self.reference)
        start = f"{self.key}: {self.reference} is no directory (looked from {Path.cwd()}) and"
        if isinstance(error, errors.GatedRepoError):
            what = f"{self.key}: {name} is gated: accept its terms on its page, and set HF_TOKEN to a token that may read it"
        elif isinstance(error, errors.RepositoryNotFoundError):
            what = f"{start} {name} is no model of the hub that can be read; check the name, or set HF_TOKEN if it is private"
        elif isinstance(error, errors.RevisionNotFoundError):
            what = f"{self.key}: {name} has no revision {revision}; name a branch, a tag or a commit of it"
        elif isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            what = f"{self.key}: {name} has no config.json; it must be a model for transformers"
        elif constants.HF_HUB_OFFLINE:
            what = f"{start} {name} is not in the hub's cache as a whole; unset HF_HUB_OFFLINE, or name a directory"
        else:
            cause = error.__cause__ or error
            reason = " ".join(str(cause).split())[:160] or type(cause).__name__
            what = f"{start} {name} could not be fetched from the hub ({reason}); try again, or name a directory"
        raise UserError(what) from error
