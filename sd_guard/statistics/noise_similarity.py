"""Do different seeds end in the same picture, seen in the first noise prediction? (NeMo, arXiv 2406.02366).

Hintersdorf et al. (2024, NeurIPS, "Finding NeMo"): what the model predicts beyond the noise it was given is one picture
for all seeds of a memorized prompt. Pairs of seeds are compared by multi-scale SSIM (Wang et al. 2003).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d

from sd_guard.noise import at_least_float32
from sd_guard.statistics.base import Denoiser, StepCall

_WINDOW, _SIGMA = 11, 1.5
_EXPONENT, _SCALES = 0.33, 3
_C1, _C2 = 0.01**2, 0.03**2


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSimilarity:
    """The largest SSIM between two seeds' ``e_c - x``, each channel scaled to [0, 1], at the first step.

    As in the authors' code (ml-research/localizing_memorization_in_diffusion_models): the prompt's prediction without
    guidance, ten seeds, three scales of exponent 0.33 with a window of 11, and a prompt counted as memorized where any
    pair exceeds 0.428, the threshold taken from ordinary prompts. Their code evaluates the initial noise at the
    *second* of 50 timesteps; here it is the step's own. Latents below 44 a side are too small for three scales, and
    get as many as fit (below 11 a side, one with a smaller window).

    Attributes:
        at: the first step, pure noise.
    """

    name: str = field(default="noise_similarity", init=False)
    higher_is_memorized: bool = field(default=True, init=False)
    lanes: float = field(default=0.0, init=False)
    at: tuple[float, ...] | None = (0.0,)

    def feature(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B, C, H, W) in [0, 1]: predicted noise less the UNet's input, each channel stretched to the whole range."""
        difference = model.read(call, "conditional").e_hat - at_least_float32(call.x)
        low, high = difference.amin((2, 3), keepdim=True), difference.amax((2, 3), keepdim=True)
        return (difference - low) / (high - low).clamp(min=torch.finfo(difference.dtype).tiny)

    def compare(self, features: Tensor) -> float:
        """In [0, 1], of (N, C, H, W) features; 1 where two seeds show the same.

        Raises:
            ValueError: fewer than two seeds.
        """
        if len(features) < 2:
            raise ValueError(f"{len(features)} seeds cannot be compared: give features of at least two")
        first, second = torch.combinations(torch.arange(len(features), device=features.device)).unbind(1)
        return float(multiscale_ssim(features[first], features[second]).max())


def multiscale_ssim(left: Tensor, right: Tensor) -> Tensor:
    """Structural similarity over scales: contrast and structure on each, luminance on the coarsest only.

    Args:
        left: (P, C, H, W) in [0, 1].
        right: likewise.

    Returns:
        (P,) in [0, 1]; a scale that is negative on average counts as 0.
    """
    side = min(left.shape[-2:])
    window = min(_WINDOW, side - 1 + side % 2)
    scales = max(n for n in range(1, _SCALES + 1) if n == 1 or side >> (n - 1) >= window)
    product = torch.ones(len(left), dtype=left.dtype, device=left.device)
    for scale in range(scales):
        if scale > 0:
            left, right = avg_pool2d(left, 2), avg_pool2d(right, 2)
        luminance, structure = _ssim_terms(left, right, window)
        seen = structure if scale < scales - 1 else luminance * structure
        product = product * seen.mean((1, 2, 3)).relu() ** _EXPONENT
    return product


def _ssim_terms(left: Tensor, right: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Luminance, and contrast times structure (Wang et al. 2004), (P, C, h, w) where the Gaussian window fits."""
    offset = torch.arange(window, dtype=left.dtype, device=left.device) - window // 2
    weight = torch.exp(-((offset / _SIGMA) ** 2) / 2)
    weight = weight / weight.sum()

    def smooth(item: Tensor) -> Tensor:
        planes = conv2d(item.flatten(0, 1)[:, None], weight.reshape(1, 1, -1, 1))
        return conv2d(planes, weight.reshape(1, 1, 1, -1))[:, 0].unflatten(0, item.shape[:2])

    mean_left, mean_right = smooth(left), smooth(right)
    variances = (smooth(left**2) - mean_left**2).clamp(min=0) + (smooth(right**2) - mean_right**2).clamp(min=0)
    covariance = smooth(left * right) - mean_left * mean_right
    luminance = (2 * mean_left * mean_right + _C1) / (mean_left**2 + mean_right**2 + _C1)
    return luminance, (2 * covariance + _C2) / (variances + _C2)
