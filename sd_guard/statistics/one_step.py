"""Does one step already give a picture with edges, the same for all seeds? (Webster 2023, arXiv 2305.08694)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import conv3d, interpolate, pad

from sd_guard.statistics.base import Denoiser, StepCall

_SIDE = 256  # pixels a side at which the thresholds are meant


@dataclass(frozen=True, slots=True, kw_only=True)
class OneStepEdges:
    """The share of pixels that are an edge for more than half of the seeds, in images made in a single step.

    The black-box attack of the paper. As in the author's code (ryanwebster90/onestep-extraction): four seeds, guidance
    of 7.5, images of 256 x 256 pixels, an edge where the Sobel magnitude summed over the channels exceeds 1.5, and the
    three-dimensional Sobel filter of SciPy, which smooths over the three channels too.

    He steps from the highest noise level of a Karras schedule; here it is from the step that is measured, whose two
    predictions give the guided ``x0_hat``. Images above 256 a side are shrunk with an antialiased bicubic instead of a
    Lanczos filter, and smaller ones (not in the paper) stay as they are.

    Attributes:
        guidance_scale: of the single step, whatever the sampler's own is.
        threshold: of the summed Sobel magnitude, for values in [0, 1].
        agreement: share of the seeds that must be exceeded.
        at: the first step, pure noise.
    """

    name: str = field(default="one_step_edges", init=False)
    higher_is_memorized: bool = field(default=True, init=False)
    lanes: float = field(default=0.0, init=False)
    guidance_scale: float = 7.5
    threshold: float = 1.5
    agreement: float = 0.5
    at: tuple[float, ...] | None = (0.0,)

    def feature(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B, h, w) of 0 and 1: where the one-step image has an edge; NaN where it is not finite. Costs a decoding.

        Raises:
            ValueError: there is no autoencoder, or the sampler evaluated no control.
        """
        if model.decode is None:
            raise ValueError("decode is None: OneStepEdges looks at images, give a Denoiser with an autoencoder")
        control = model.read(call, "control").x0_hat
        image = model.decode(control + self.guidance_scale * (model.read(call, "conditional").x0_hat - control))
        if min(image.shape[-2:]) > _SIDE:
            image = interpolate(image, size=(_SIDE, _SIDE), mode="bicubic", antialias=True).clamp(0, 1)
        strength = edge_strength(image)
        return (strength > self.threshold).to(image.dtype).where(strength.isfinite(), torch.nan)

    def compare(self, features: Tensor) -> float:
        """In [0, 1], of (N, h, w) features; NaN where one of the images was not finite.

        Raises:
            ValueError: fewer than two seeds.
        """
        if len(features) < 2:
            raise ValueError(f"{len(features)} seeds cannot be compared: give features of at least two")
        share = features.mean(0)
        return float((share > self.agreement).to(features.dtype).where(share.isfinite(), torch.nan).mean())


def edge_strength(image: Tensor) -> Tensor:
    """Sobel magnitude, summed over the channels.

    Args:
        image: (B, C, H, W) in [0, 1].

    Returns:
        (B, H, W), at least 0. The borders are repeated.
    """
    smooth = torch.tensor([1.0, 2.0, 1.0], dtype=image.dtype, device=image.device)
    slope = torch.tensor([-1.0, 0.0, 1.0], dtype=image.dtype, device=image.device)
    down = torch.einsum("c,i,j->cij", smooth, slope, smooth)
    kernel = torch.stack([down, down.mT])[:, None]
    gradient = conv3d(pad(image[:, None], (1,) * 6, mode="replicate"), kernel)
    return torch.hypot(gradient[:, 0], gradient[:, 1]).sum(1)
