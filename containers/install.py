"""Install megatron-ssu inside a GPU container, beside the torch and Transformer Engine that the image brings, if any.

    python3 containers/install.py      in the checkout's root; makes .venv there

What the image has of torch, Transformer Engine, Apex, triton and numpy stays as it is: pip gets their versions as
constraints. What it lacks of the first two is installed at the versions below, and constrains what follows. Anything that fails
ends the build, kernels without their CUDA part too.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

TORCH, TRANSFORMER_ENGINE = "2.11.0", "2.20.2"
LEAST_TRANSFORMER_ENGINE = (2, 18)  # older ones skip updates beside tensors without elements
CHECK = "import torch, transformer_engine.pytorch, megatron.core, megatron_ssu._C as c; assert c.CUDA, 'no nvcc in the image'"
KEPT = ("torch", "triton", "numpy", "apex", "transformer-engine", "transformer-engine-torch")
KEPT += tuple(f"transformer-engine-cu{major}" for major in (12, 13))


def installed() -> dict[str, str]:
    """Name -> version of the packages that must stay as they are."""
    found = {}
    for name in KEPT:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def constraints(found: dict[str, str]) -> str:
    """What pip takes with -c: one `name==version` per line."""
    return "".join(f"{name}=={version}\n" for name, version in sorted(found.items()))


def refusal(found: dict[str, str], python: tuple[int, int]) -> str | None:
    """Why this image cannot be used; None where it can."""
    if not (3, 10) <= python <= (3, 12):
        return f"the image's Python must be 3.10 to 3.12, got {python[0]}.{python[1]}"
    engine = found.get("transformer-engine")
    least = ".".join(map(str, LEAST_TRANSFORMER_ENGINE))
    if engine is not None and tuple(int(part) for part in engine.split(".")[:2]) < LEAST_TRANSFORMER_ENGINE:
        return f"the image's Transformer Engine must be {least} or newer, got {engine}; take a newer image"
    if engine is not None and "torch" not in found:
        return "the image has Transformer Engine but no torch; take an image with both, or with neither"
    return None


def commands(found: dict[str, str], pip: list[str]) -> list[list[str]]:
    """The pip calls, in order."""
    calls = [[*pip, "setuptools>=77", "wheel", "ninja", "pybind11", "packaging"]]
    if "torch" not in found:
        calls.append([*pip, f"torch=={TORCH}"])
    if "transformer-engine" not in found:
        calls.append([*pip, "--no-build-isolation", f"transformer-engine[pytorch]=={TRANSFORMER_ENGINE}"])
    calls.append([*pip, "--no-build-isolation", "-e", ".[test]"])
    return calls


def main() -> None:
    found = installed()
    if message := refusal(found, sys.version_info[:2]):
        sys.exit(f"containers/install.py: {message}")
    kept = Path("/tmp/kept.txt")
    print(f"kept from the image: {constraints(found).split() or 'nothing'}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--system-site-packages", ".venv"], check=True)
    python = str(Path(".venv/bin/python").absolute())
    look = (
        "import sys; sys.path.insert(0, 'containers'); import install; print(install.constraints(install.installed()))"
    )
    # An image may constrain pip to the versions that it was built with; ours are in `kept`.
    environment = {k: v for k, v in os.environ.items() if k != "PIP_CONSTRAINT"} | {"MEGATRON_SSU_BUILD": "1"}
    for command in commands(found, [python, "-m", "pip", "install", "--no-cache-dir", "-c", str(kept)]):
        kept.write_text(subprocess.run([python, "-c", look], check=True, capture_output=True, text=True).stdout)
        subprocess.run(command, check=True, env=environment)
    subprocess.run([python, "-c", CHECK], check=True)
    Path(".venv/.ready").touch()  # make needs to set nothing up


if __name__ == "__main__":
    main()
