"""Gather, scatter, columns of activations, column sums: bytes per second against a memory copy in the same run.

    python benchmarks/kernels.py --mib 64 256 --ratio 0.5 --json runs/kernels.json

How bytes are counted. A copy of n bytes counts 2n: read and written. A gather counts the cache lines (64 bytes; on CUDA
sectors of 32) of the shard that hold a trainable element, and the compact output written. A scatter counts the compact
values read and those lines twice: a line that keeps frozen elements must be read to be written. Index bytes and the read
of a line that a plain store is about to overwrite count for neither side. Columns of activations count all activations
once and the output, which is allocated each time, as the one of index_select beside it; "one by one" is one call per set,
and index_select is called per set. Column sums count the weights.
"share" is a kernel's bytes/s over the copy's, both from medians; the copy is of the same shard, in its own dtype.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, nargs="+", default=[64, 256], help="shard sizes in MiB")
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument(
        "--mask", nargs="+", choices=["column", "fused", "element"], default=["column", "fused", "element"]
    )
    parser.add_argument("--ratio", type=float, default=0.5, help="frozen share")
    parser.add_argument("--width", type=int, default=4096, help="columns of the shard")
    parser.add_argument("--tokens", type=int, default=2048, help="rows of the activations")
    parser.add_argument("--inputs", type=int, nargs="+", default=[2048, 5632], help="columns of the activations")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="default: as torch chooses")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    args = parser.parse_args()
    begin()
    from measure import kernels

    kernels.run(args)


if __name__ == "__main__":
    main()
