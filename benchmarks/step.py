"""A training step under shields of several ratios against full fine-tuning on stock megatron-core.

python benchmarks/step.py [--layers 1] [--hidden 2048] [--dtype bf16] [--rounds 9] [--json FILE]
python benchmarks/step.py --hidden 5120 --ffn 13824 --heads 40 --length 4096 --micro-batch 1 --batch 2 --layers 2
                                                                                                (13B layers, a GPU of 80 GB)

Stock is megatron's DistributedOptimizer, whole weights and `optimizer.step()`, with the same settings as ours, Adam's kernel
among them: Transformer Engine's or Apex's, else torch's fused one. All ratios are to it. "stock, unfused" has torch's Adam as
megatron leaves it, for information, on a CPU. Other variants name a shield and its frozen fraction: "SSU 0.5" freezes half of
the columns of every linear weight, "row 0.5" half of the rows, "element 0.5" half of the elements.

A step's ratio is the median of the rounds' own ratios to stock. "exchange" is what a step reduces of gradients and gathers of
parameters, were it data parallel; "state" is weights, compact parameters, gradients and what the optimizer holds; "shield" is
the time of all gathers and scatters, of parameters and of the operands of weight gradients.

Side by side (the default on a CPU) all variants are held at once and take a step in turn. In turns (on a GPU) one variant is in
memory at a time: each is built, timed and freed, twice over, and a round's ratio is to the median of stock in the same pass.
Peak memory on a CPU is that of a process of its own for each variant, above what it held before the model; on a GPU, what was
allocated while it was there. Times of parts are read from CUDA events after the step, so that measuring synchronises nothing
within it.
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
    parser.add_argument(
        "--experts", type=int, help="a Qwen3-MoE with so many experts of width --ffn, in place of an OLMo-2"
    )
    parser.add_argument("--active", type=int, default=8, help="experts that a token goes through")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences per micro-batch")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--fp8", choices=("hybrid", "e4m3"), help="Transformer Engine's FP8, on a GPU")
    parser.add_argument("--fp8-recipe", choices=("delayed", "tensorwise", "blockwise"), default="delayed")
    kernels = parser.add_mutually_exclusive_group()
    kernels.add_argument(
        "--fused", action="store_true", default=True, help="megatron's fused kernels, on a GPU (default)"
    )
    kernels.add_argument("--unfused", dest="fused", action="store_false", help="without them, stock and ours alike")
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", help="stock and these, such as 'SSU 0.5' or 'row 0.5' (default: all)"
    )
    parser.add_argument(
        "--in-turns",
        action=argparse.BooleanOptionalAction,
        help="one variant in memory at a time (default on a GPU), or all side by side (on a CPU)",
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
