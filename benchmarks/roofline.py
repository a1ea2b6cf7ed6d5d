"""Roofline of one layer's linear GEMMs and of its optimizer update: what bounds each, and what a frozen half saves.

python benchmarks/roofline.py [--hidden 2048] [--tokens 4096] [--dtype bf16]    (this machine: peaks and times measured)
python benchmarks/roofline.py --hidden 5120 --ffn 13824 --gpu h100              (a data sheet: bounds alone)

A GEMM of [T, I] and [I, O] is 2 T I O FLOPs and moves its three matrices once. The time bound is the larger of FLOPs over the
peak rate of a GEMM and bytes over the copy rate. "measured" runs the very functions of a training step: weight gradients are
added to fp32 buffers, the whole one [O, I], and the compact ones of `--ratio` frozen columns, or rows, of each matrix, which
gather columns of the input, or of the output gradient, before their GEMMs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import begin

from megatron_ssu.estimate.hardware import GPUS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, help="default 2.75 x hidden")
    parser.add_argument("--tokens", type=int, default=4096, help="of a micro-batch on one rank")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--gpu", choices=GPUS, help="take its data sheet and measure nothing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    options = parser.parse_args()
    begin()
    from measure import roofline

    roofline.run(options)


if __name__ == "__main__":
    main()
