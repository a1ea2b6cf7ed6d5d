"""Before megatron-core is imported on a machine without CUDA: hide the packages whose kernels need CUDA.

megatron-core takes them wherever they can be imported, and its optimizer would call them on CPU tensors.
"""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any

CUDA_ONLY = ("transformer_engine", "apex", "amp_C")


class HideCudaOnly(importlib.abc.MetaPathFinder):
    """Finds nothing; asked for a part of megatron.core, it makes the imports of CUDA_ONLY fail where CUDA is not."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname.startswith("megatron.core."):
            import torch

            if not torch.cuda.is_available():
                for name in CUDA_ONLY:
                    sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def hide_cuda_only() -> None:
    """From now on, in this process."""
    sys.meta_path.insert(0, HideCudaOnly())
