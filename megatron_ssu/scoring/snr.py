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
    """The score of a matrix [O, I], computed in float32; 0 for a matrix of zeros."""
    import torch

    singular = torch.linalg.svdvals(matrix.float())
    low, high = torch.quantile(singular, torch.tensor([0.25, 0.75], device=singular.device))
    beta = min(matrix.shape) / max(matrix.shape)
    threshold = (high - low) / 1.349 * (1 + beta**0.5)
    signal, noise = singular[singular > threshold].double().sum(), singular[singular <= threshold].double().sum()
    greatest = float(singular.max())
    return float(signal) / (float(noise) or 1.0) / greatest if greatest else 0.0


SNR = Score("snr", needs="weights", matrix=Whole(signal_to_noise))
