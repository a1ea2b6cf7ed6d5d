"""A training step under shields of several ratios against full fine-tuning on stock megatron-core.

python benchmarks/step.py [--layers 1] [--hidden 2048] [--dtype bf16] [--rounds 9] [--json FILE]
python benchmarks/step.py --hidden 5120 --ffn 13824 --heads 40 --length 4096 --micro-batch 1 --batch 2 --layers 2
                                                                                                (13B layers, a GPU of 80 GB)

Stock is megatron's own DistributedOptimizer, linear layers and Adam in the same loop, with the same settings; "stock, fused"
has torch's fused AdamW, as this trainer has where neither Transformer Engine's nor Apex's is there. A figure is the median
over the rounds, its ratio that of the rounds' own ratios to stock.

On a CPU all variants are held at once and take a step in turn; peak memory is that of a process of its own for each variant,
above what it held before the model: without the libraries. On a GPU one variant is in memory at a time: each is built, timed
and freed, twice over, and a round's ratio is to the median of stock in the same pass; peak memory is what was allocated while
it was there. Times of parts are read from CUDA events after the step, so that measuring synchronises nothing within it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, help="default 2.75 x hidden")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--length", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences a micro-batch")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--fp8", choices=("hybrid", "e4m3"), help="Transformer Engine's FP8, on a GPU")
    kernels = parser.add_mutually_exclusive_group()
    kernels.add_argument(
        "--fused", action="store_true", default=True, help="megatron's fused kernels, on a GPU (default)"
    )
    kernels.add_argument("--unfused", dest="fused", action="store_false", help="without them, stock and ours alike")
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", help="stock and these, such as 'SSU 0.5' (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--profile", metavar="NAME", help="print what three steps of this variant are made of instead")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--peak", nargs=2, metavar=("VARIANT", "MODEL"), help=argparse.SUPPRESS)  # the measured child
    options = parser.parse_args()
    begin()
    from measure import step

    step.run(options)


if __name__ == "__main__":
    main()
