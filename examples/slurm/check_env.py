"""Checks that a job can start, made before any rank starts: one line per problem, exit status 2.

    check_env.py run WORLD RUN.yaml [KEY=VALUE ...]    the run file on a mesh of WORLD ranks, once; prints the run's directory
    check_env.py node FOLDER --nodes N --ranks R       on every node: its GPUs, its packages, the shared FOLDER

FOLDER must hold a file `token`, written by another process of the job: a node that does not see it does not share the folder.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "safetensors", "numpy", "megatron-ssu")
NEEDED = ("torch", "megatron-core", "transformers", "safetensors", "numpy")


def main() -> int:
    options = _options()
    return check_run(options) if options.part == "run" else check_node(options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    run = parts.add_parser("run", help="check the run file and its mesh")
    run.add_argument("world", type=int, help="ranks of the job")
    run.add_argument("run", metavar="RUN.yaml")
    run.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    node = parts.add_parser("node", help="check the node that this runs on")
    node.add_argument("folder", type=Path, help="a folder that all nodes share")
    node.add_argument("--nodes", type=int, required=True, help="nodes of the job")
    node.add_argument("--ranks", type=int, required=True, help="ranks per node, one per GPU")
    node.add_argument("--cpu", action="store_true", help="ranks on CPUs, gloo between them: GPUs are not looked at")
    node.add_argument("--wait", type=float, default=60.0, help="seconds until a file of another node must be seen")
    return parser.parse_args()


def check_run(options: argparse.Namespace) -> int:
    """The checks of `megatron-ssu train` that need no weights; prints checkpoint.directory, absolute."""
    os.environ["WORLD_SIZE"] = str(options.world)
    warnings.simplefilter("ignore")  # those of libraries
    from megatron_ssu.commands.start import check_run as check
    from megatron_ssu.errors import UserError
    from megatron_ssu.methods.registry import method_of, read_run

    try:
        run = read_run(options.run, options.overrides)
        check(run, method_of(run))
    except UserError as error:
        return _tell([str(error)])
    print(Path(run.checkpoint.directory).resolve())
    return 0


def check_node(options: argparse.Namespace) -> int:
    """This node by itself; then node 0 compares what all have written."""
    number, name = int(os.environ.get("SLURM_NODEID", "0")), os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    facts = _versions()
    problems = [f"{name}: {package} is not installed" for package in NEEDED if package not in facts]
    if not problems:
        problems += _communication(options, name, facts)
    token = options.folder / "token"
    if not _seen(token, options.wait):
        problems.append(f"{name}: {token} is not to be seen here; checkpoint.directory must be shared by all nodes")
        return _tell(problems)
    try:
        _write(options.folder / f"node-{number}.json", {"name": name, "facts": facts})
    except OSError as error:
        problems.append(f"{name}: {options.folder} cannot be written: {error.strerror}; see checkpoint.directory")
    if number == 0:
        problems += _compare(options)
    return _tell(problems)


def _versions() -> dict[str, str]:
    facts = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts


def _communication(options: argparse.Namespace, name: str, facts: dict[str, str]) -> Iterator[str]:
    """Problems of GPUs and of the backend between them; notes NCCL's version in `facts`."""
    import torch
    import torch.distributed as dist

    if options.cpu:
        if not dist.is_gloo_available():
            yield f"{name}: this torch has no gloo; install another build"
        return
    if not dist.is_nccl_available():
        yield f"{name}: torch {torch.__version__} has no NCCL; install a CUDA build"
    else:
        facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    found = torch.cuda.device_count()
    if found < options.ranks:
        yield f"{name}: {found} GPUs are usable and {options.ranks} are asked for; see --gpus-per-node and the driver"
    for index in range(min(found, options.ranks)):
        try:
            torch.ones(1, device=f"cuda:{index}").item()
        except RuntimeError as error:
            yield f"{name}: GPU {index} does not work: {' '.join(str(error).split())[:160]}"
    facts["GPU"] = torch.cuda.get_device_name(0) if found else "none"


def _compare(options: argparse.Namespace) -> Iterator[str]:
    """What the other nodes have otherwise than node 0, and nodes whose file does not come."""
    files = [options.folder / f"node-{number}.json" for number in range(options.nodes)]
    deadline = time.monotonic() + options.wait
    read: list[dict[str, Any] | None] = [
        json.loads(file.read_text()) if _seen(file, deadline - time.monotonic()) else None for file in files
    ]
    first = read[0]
    for number, other in enumerate(read):
        if other is None:
            yield f"node {number}: has written no {files[number]} for the others to see; is the folder shared by all nodes?"
        elif first is not None:
            for key in sorted(first["facts"].keys() | other["facts"].keys()):
                here, there = first["facts"].get(key, "none"), other["facts"].get(key, "none")
                if here != there:
                    yield f"{other['name']}: {key} {there}, but {here} on {first['name']}; they must be the same"


def _seen(file: Path, seconds: float) -> bool:
    """Whether the file is there, at once or within some seconds. Network file systems show new files late."""
    deadline = time.monotonic() + seconds
    while not file.is_file():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.2)
    return True


def _write(file: Path, content: dict[str, Any]) -> None:
    part = file.with_name(f".{file.name}.part")
    part.write_text(json.dumps(content))
    os.replace(part, file)


def _tell(problems: list[str]) -> int:
    for problem in problems:
        print(f"check: {problem}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
