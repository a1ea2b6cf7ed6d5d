"""What all benchmarks share: a quiet start, interleaved timing, the machine's description, a table and a JSON file.

Variants are timed A B A B ... in one process, so that a machine that slows down slows all of them. A figure is a median
with the spread between the 25th and 75th percentile.
"""

from __future__ import annotations

import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ssu.io.atomic import write_text

if TYPE_CHECKING:
    from rich.console import Console

LEAD = 200_000  # cycles that a GPU waits before it is timed: what is launched in the meantime begins without a gap
PACKAGES = ("megatron-ssu", "torch", "megatron-core", "transformers", "transformer-engine", "numpy")


def begin() -> None:
    """Before torch is loaded: set what the command line sets, and keep what libraries say out of the output."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for kind in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=kind)
    import megatron_ssu  # noqa: F401  first: it keeps what needs CUDA from megatron-core where there is none


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant over the rounds of an interleaved run."""

    median: float
    low: float  # 25th percentile
    high: float  # 75th percentile
    best: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        import numpy as np

        low, median, high = np.percentile(seconds, (25, 50, 75))
        return cls(float(median), float(low), float(high), float(min(seconds)), len(seconds))

    def spread(self) -> float:
        """Interquartile range as a fraction of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


def interleave(variants: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Time each variant once a round, in turn; `warmup` rounds are dropped. On CUDA it is the GPU's time."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warmup + rounds):
        for name, run in variants.items():
            spent = _time(run)
            if number >= warmup:
                seconds[name].append(spent)
    return {name: Timing.of(values) for name, values in seconds.items()}


def _time(run: Callable[[], object]) -> float:
    import torch

    if not torch.cuda.is_available():
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(LEAD)
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def machine() -> dict[str, Any]:
    """Processor, cores in use, memory, GPU and versions, for the JSON file and the head of the table."""
    import torch

    described: dict[str, Any] = {
        "processor": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": list(os.getloadavg()),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        described["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        described["gpu"] = properties.name
        described["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        described["cuda"] = torch.version.cuda
    return described


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def show(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table; the first column is flush left, figures flush right."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)


def milliseconds(timing: Timing) -> str:
    """'12.3 ms +-4 %'."""
    return f"{timing.median * 1e3:.3g} ms ±{timing.spread() * 50:.0f} %"


def write_json(path: Path, settings: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
    """{machine, settings, results}; Timing values become their fields. Replaces `path` in one step."""
    document = {"machine": machine(), "settings": dict(settings), "results": list(results)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(document, indent=1, default=_plain) + "\n")


def _plain(value: object) -> object:
    import torch

    if isinstance(value, Timing):
        return asdict(value)
    if isinstance(value, (torch.dtype, torch.device, Path)):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
