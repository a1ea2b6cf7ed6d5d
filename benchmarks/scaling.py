"""Predicted step time and traffic of full fine-tuning and SSU on 8 to 1024 GPUs: a model, not a measurement.

python benchmarks/scaling.py [--model 13B] [--gpu h100] [--ratio 0.5] [--batch 1024] [--length 4096] [--json FILE]

Counts are `megatron-ssu estimate`'s: bytes and FLOPs from the model's shapes, traffic from the mesh, seconds from the GPU's
data sheet. For every number of GPUs the fastest mesh is taken that fits into 85 % of the memory. --measured takes the fraction
of the peak that GEMMs reach from what step.py measured on such a GPU (its "MFU %" of stock); without it 60 % is assumed.
Before that, counted and not predicted: bytes of weights, gradients and optimizer state, of the exchange of gradients and
weights, and of the optimizer step, on one rank of a mesh of data parallelism alone, over full fine-tuning's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import begin

from megatron_ssu.estimate.hardware import GPUS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("7B", "13B", "32B"), default="13B", help="OLMo-2's shapes")
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=1024, help="sequences per step")
    parser.add_argument("--length", type=int, default=4096, help="tokens per sequence")
    parser.add_argument("--measured", type=Path, help="JSON of step.py from such a GPU")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    options = parser.parse_args()
    begin()
    from measure import scaling

    scaling.run(options)


if __name__ == "__main__":
    main()
