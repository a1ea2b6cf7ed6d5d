"""What scoring costs over a forward-only pass of megatron-core, and what planning a 13B model costs.

python benchmarks/score.py [--layers 4] [--hidden 1024] [--dtype fp32] [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--plan-only", metavar="SCORES", help=argparse.SUPPRESS)  # the child process that is measured
    options = parser.parse_args()
    begin()
    from measure import score

    score.run(options)


if __name__ == "__main__":
    main()
