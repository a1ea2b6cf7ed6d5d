"""Tables of a GPU report as Markdown, by themselves or in the places of docs/ that are marked for them.

A place is marked `<!-- gpu-report NAME -->` before and `<!-- end of gpu-report NAME -->` after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

STEPS = {
    "step bf16": "bf16, fused kernels",
    "step bf16 unfused": "bf16, unfused",
    "step fp8": "FP8, fused kernels",
    "step fp8 unfused": "FP8, unfused",
}
NOTHING = "not measured"


def markdown(report: dict[str, Any]) -> str:
    """All tables, with headings."""
    return "\n\n".join(f"## {name.capitalize()}\n\n{table(report)}" for name, table in TABLES.items()) + "\n"


def update_docs(report: dict[str, Any], folder: Path) -> None:
    """Replace the tables in the marked places of the Markdown files in `folder`.

    Raises:
        ValueError: a table has no place in any of the files.
    """
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.md"))}
    for name, table in TABLES.items():
        first, last = f"<!-- gpu-report {name} -->", f"<!-- end of gpu-report {name} -->"
        holders = [path for path, text in texts.items() if first in text and last in text]
        if not holders:
            raise ValueError(f"{folder}: no place for the table {name!r}; mark one with {first} and {last}")
        for path in holders:
            before, _, rest = texts[path].partition(first)
            texts[path] = f"{before}{first}\n{table(report)}\n{last}{rest.partition(last)[2]}"
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")


def overview(report: dict[str, Any]) -> str:
    """Machine, tests and what each part came to."""
    described, parts = report.get("machine", {}), report.get("parts", {})
    versions = ", ".join(f"{name} {version}" for name, version in described.get("versions", {}).items())
    gpu = f"{described['gpu']}, {described['gpu_memory_gib']} GiB" if "gpu" in described else NOTHING
    lines = [("GPU", gpu), ("CUDA, versions", f"{described.get('cuda', '?')}; {versions}" if versions else NOTHING)]
    lines += [("date", described.get("date", NOTHING)), ("`tests/gpu`", _tests(parts.get("tests")))]
    lines += [(name, f"{part['status']}, {part['seconds']} s") for name, part in parts.items() if name != "tests"]
    return _table(("", "result"), lines)


def _tests(part: dict[str, Any] | None) -> str:
    if part is None:
        return "not run"
    found = part.get("results")
    if not found:
        return part["status"]
    names = (
        f" ({', '.join(found['failed'][:5])}{', ...' if len(found['failed']) > 5 else ''})" if found["failed"] else ""
    )
    cut = "; cut off" if part["status"] == "cut off" else ""
    return f"{found['passed']} passed, {len(found['failed'])} failed{names}, {found['skipped']} skipped{cut}"


def steps(report: dict[str, Any]) -> str:
    """Step time of full fine-tuning and of ratio 0.5 by columns, and by rows; ratios to stock with the same settings."""
    heads: tuple[str, ...] = (
        "one GPU, two OLMo-2-13B layers",
        "stock, ms",
        "ratio 0.5, ms",
        "step",
        "spread",
        "forward",
    )
    heads += ("backward", "optimizer", "shield", "state", "exchange", "peak", "rows: step", "MFU, stock and 0.5")
    lines = []
    for part, name in STEPS.items():
        rows = {row["what"]: row for row in _results(report, part)}
        stock, ours = rows.get("stock"), rows.get("SSU 0.5")
        if stock is None or ours is None:
            lines.append((name, NOTHING, *[""] * (len(heads) - 2)))
            continue
        ratios = [f"{ours[key]:.3f}" for key in ("forward", "backward", "optimizer")]
        times = [stock["step ms"], ours["step ms"], f"{ours['step']:.3f}", ours["spread"], *ratios]
        sizes = [f"{ours['shield %']} %", *(f"{ours[what]:.2f}" for what in ("state", "exchange", "peak"))]
        by_row = f"{rows['row 0.5']['step']:.3f}" if "row 0.5" in rows else NOTHING
        lines.append((name, *times, *sizes, by_row, f"{stock.get('MFU %', '?')} %, {ours.get('MFU %', '?')} %"))
    return _table(heads, lines)


def _of(mask: str) -> str:
    """The kind of mask as part of a row's name; '-' is none."""
    return "" if mask == "-" else f"{mask} shield, "


def kernels(report: dict[str, Any]) -> str:
    """Gather, scatter and columns of activations against a copy of the same tensor on the GPU."""
    lines = [
        (
            f"{row['operation']}, {_of(row['mask'])}{row['dtype']}, {row['shard_mib']} MiB",
            f"{row['bytes'] / row['kernel']['median'] / 1e9:,.0f} GB/s",
            f"{row['copy_bytes'] / row['copy']['median'] / 1e9:,.0f} GB/s",
            f"{row['share']:.0%}",
            f"{row['torch_share']:.0%}",
        )
        for row in _results(report, "kernels")
    ]
    return _table(
        ("kernel, on a GPU", "kernel", "device copy", "fraction of the copy", "torch fallback"),
        lines or [(NOTHING, *[""] * 4)],
    )


def profile(report: dict[str, Any], top: int = 15) -> str:
    """The kernels that took longest in three steps at ratio 0.5."""
    lines = [
        (f"`{row['what'].replace('|', ' ')}`", row["calls"], row["ms"], f"{row['fraction %']} %")
        for row in _results(report, "profile")[:top]
    ]
    return _table(("kernel, three steps at ratio 0.5", "calls", "ms", "fraction"), lines or [(NOTHING, "", "", "")])


def _results(report: dict[str, Any], part: str) -> list[dict[str, Any]]:
    return report.get("parts", {}).get(part, {}).get("results") or []


def _table(heads: Sequence[object], lines: Sequence[Sequence[object]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "overview": overview,
    "steps": steps,
    "kernels": kernels,
    "profile": profile,
}
