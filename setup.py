"""Builds the optional extension megatron_ssu._C (csrc/): C++ where a compiler is, its CUDA part where nvcc is.

The environment variable MEGATRON_SSU_BUILD decides: unset builds what can be built and installs without the rest,
saying so; 0 builds nothing; 1 makes a failed C++ build an error, as well as a failed CUDA build where nvcc is.
MEGATRON_SSU_CUDA_ARCHS lists compute capabilities, "80;90" by default; newer devices compile the last one's PTX.

The extension takes addresses, not torch tensors: it needs neither torch's headers at build time nor a build per torch
version, and picks AVX-512, AVX2 or portable code at run time.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("csrc")
HEADERS = ("shield_core.hpp", "rows.hpp", "column_sums.hpp", "kernels.h", "kernels.cu")
MODE = os.environ.get("MEGATRON_SSU_BUILD", "auto")


def pybind11_include() -> str:
    """pybind11's own headers, else the copy that torch ships."""
    found = importlib.util.find_spec("pybind11")
    if found is not None:
        import pybind11

        return pybind11.get_include()
    found = importlib.util.find_spec("torch")
    if found is not None and found.origin is not None:
        return str(Path(found.origin).parent / "include")
    raise RuntimeError("pybind11 is not installed")


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, else the one on the path."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = Path(home, "bin", "nvcc") if home else Path(shutil.which("nvcc") or "")
    return nvcc if nvcc.is_file() else None


def cuda_runtime(nvcc: Path) -> Path:
    """The folder of libcudart_static.a. nvcc may be a wrapper script, so it is asked where its toolkit is."""
    plan = subprocess.run([str(nvcc), "--dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    home = Path(top[1].strip() if top else nvcc.parent.parent)
    for part in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"):
        if (home / part / "libcudart_static.a").is_file():
            return home / part
    raise RuntimeError(f"libcudart_static.a is not under {home}")


class OptionalBuild(build_ext):
    """build_ext that adds the CUDA part and lets the installation go on without the extension unless told otherwise."""

    def build_extension(self, ext: Extension) -> None:
        try:
            ext.include_dirs.append(pybind11_include())
            self.add_cuda(ext)
            super().build_extension(ext)
        except Exception as error:
            if MODE == "1":
                raise
            self.tell(f"megatron_ssu._C was not built, torch does its work instead, slower: {error}")

    def add_cuda(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        if nvcc is None:
            self.tell("no nvcc: megatron_ssu._C is built without its CUDA part")
            return
        archs = os.environ.get("MEGATRON_SSU_CUDA_ARCHS", "80;90").replace(",", ";").split(";")
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        target = Path(self.build_temp, "kernels.o").resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [nvcc, "-O3", "-std=c++17", "-Xcompiler", "-fPIC", *codes, "-c", SOURCES / "kernels.cu", "-o", target]
        try:
            runtime = cuda_runtime(nvcc)
            subprocess.run([str(part) for part in command], check=True)
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            if MODE == "1":
                raise
            self.tell(f"megatron_ssu._C is built without its CUDA part: {error}")
            return
        ext.define_macros.append(("SSU_WITH_CUDA", "1"))
        ext.extra_objects.append(str(target))
        ext.library_dirs.append(str(runtime))
        ext.libraries += ["cudart_static", "rt", "pthread", "dl"]

    def tell(self, line: str) -> None:
        self.announce(f"megatron-ssu: {line}", level=3)  # a warning: shown by default
        print(f"megatron-ssu: {line}", file=sys.stderr)


def openmp_flags() -> list[str]:
    """-fopenmp where the compiler takes it (Apple's does not); without it the kernels use one thread."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <omp.h>\nint main() { return omp_get_num_threads() - 1; }\n")
        command = [*compiler.split(), "-fopenmp", str(source), "-o", str(Path(folder, "probe"))]
        return ["-fopenmp"] if subprocess.run(command, capture_output=True).returncode == 0 else []


def extensions() -> list[Extension]:
    if MODE == "0":
        return []
    openmp = openmp_flags()
    return [
        Extension(
            "megatron_ssu._C",
            [str(SOURCES / "bindings.cpp")],
            include_dirs=[str(SOURCES)],
            depends=[str(SOURCES / name) for name in HEADERS],
            extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden", "-Wno-maybe-uninitialized", "-g0", *openmp],
            extra_link_args=openmp,
            language="c++",
            optional=MODE != "1",
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": OptionalBuild})
