"""One rank of a SLURM job: `megatron-ssu` with the given arguments, its exit status left in a file.

torchrun ends with a status of its own when a rank fails, so the batch script reads the ranks' statuses from the files
$MEGATRON_SSU_STATUS/RANK. A rank that was killed, or lost the others, leaves none.
"""

from __future__ import annotations

import os
from pathlib import Path

from megatron_ssu import cli

STOPPED = (
    75,
    143,
)  # all ranks stop together, with a checkpoint: for torchrun no failure that it must report and clean up


def main() -> None:
    status: object = 1  # a bug: it keeps its traceback
    try:
        cli.main()
    except SystemExit as end:
        status = end.code or 0
        if status not in STOPPED:
            raise
    finally:
        file = Path(os.environ["MEGATRON_SSU_STATUS"]) / os.environ["RANK"]
        part = file.with_name(f".{file.name}.part")
        part.write_text(f"{status}\n")
        os.replace(part, file)


if __name__ == "__main__":
    main()
