"""snr: the signal-to-noise ratio of a matrix's singular values, as Spectrum ranks matrices (arXiv 2406.06623).

Of the singular values S: sigma = (q75(S) - q25(S)) / 1.349, the standard deviation if they were normally distributed; threshold
t = sigma (1 + sqrt(b)), b the lesser of the two dimensions over the greater;
snr = (sum of S > t) / (sum of S <= t) / max(S), where a noise of 0 counts as 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_ssu.scoring.base import Score, Whole

if TYPE_CHECKING:
    from torch import Tensor


def signal_to_noise(matrix: Tensor) -> float:
    """The score of a matrix [O, I]; 0 for a matrix of zeros."""
    import torch

    singular = _singular_values(matrix)
    quartiles = torch.tensor([0.25, 0.75], dtype=torch.float64, device=singular.device)
    low, high = torch.quantile(singular, quartiles)
    threshold = (high - low) / 1.349 * (1 + (min(matrix.shape) / max(matrix.shape)) ** 0.5)
    signal, noise = float(singular[singular > threshold].sum()), float(singular[singular <= threshold].sum())
    greatest = float(singular.max())
    return signal / (noise or 1.0) / greatest if greatest else 0.0


def _singular_values(matrix: Tensor) -> Tensor:
    """float64 [min(O, I)], as roots of the eigenvalues of W W^T or W^T W, whichever is smaller.

    In float64 these are nearer to the exact ones than a float32 decomposition, which takes several times as long.
    """
    import torch

    wide = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()).double()
    eigenvalues: Tensor = torch.linalg.eigvalsh(wide @ wide.t())
    return eigenvalues.clamp(min=0).sqrt()


SNR = Score("snr", needs="weights", matrix=Whole(signal_to_noise))
