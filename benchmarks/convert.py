"""Import and export of a Hugging Face directory: bytes per second, and memory beside the rank's own shard.

python benchmarks/convert.py [--gb 3] [--config FILE] [--tensor 1 2] [--data 1] [--writers 1 2] [--rounds 3] [--json FILE]

A made-up bf16 model of the asked size, with the shapes of a config.json where one is given and as many layers as fit, is read
into every mesh and written back, by ranks of their own each time, and the copy is compared with the original bit by bit.
Memory is what a rank's process holds in anonymous and shared pages, sampled every 2 ms; pages of the mapped files are the
system's cache and count for nobody. With --cold the files are dropped from that cache before each import. On CUDA the GPU's
peak is told as well.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=3.0, help="bytes of the model, in 10^9")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=100352)
    parser.add_argument(
        "--config", type=Path, help="config.json of a model whose shapes to take, instead of the two above"
    )
    parser.add_argument("--tensor", type=int, nargs="+", default=[1, 2], help="tensor-parallel sizes")
    parser.add_argument("--data", type=int, nargs="+", default=[1], help="data-parallel sizes")
    parser.add_argument(
        "--writers", type=int, nargs="+", default=[0], help="ranks that write at most; 0: as many as can"
    )
    parser.add_argument("--shard-gb", type=float, default=1.0, help="bytes of an exported file, in 10^9")
    parser.add_argument("--cold", action="store_true", help="drop the files from the system's cache before each import")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files go (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--rank", nargs=2, metavar=("MODEL", "OUTPUT"), type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    begin()
    from measure import convert

    convert.run(options)


if __name__ == "__main__":
    main()
