"""The guidance's norm, and its angle to the unconditional score.

Asthana and Belagiannis (2026, ICLR, arXiv 2601.20642).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sd_guard.lanes import evaluate_lanes
from sd_guard.noise import NoiseLevel, interpret
from sd_guard.statistics.base import Denoiser, StepCall


@dataclass(frozen=True, slots=True, kw_only=True)
class Anisotropy:
    """``norm_weight |e_c - e_u| + alignment_weight mean_places cos(e_u, e_c - e_u)``, both at the same pure noise.

    The norm is taken at the noise's own timestep (log-probabilities are isotropic there), the cosine at a *low-noise*
    timestep that the UNet is told although its input is still pure noise: no denoising is done. At each place the
    cosine is over the channels.

    What is known comes from the abstract and from the authors' code (rohanasthana/memorization-anisotropy): the two
    terms, the low timestep (the third from last of 50 DDIM steps, 41 of 1000), the cosine over channels, and weights
    of (1, 2) for Stable Diffusion 1.4, (1, 0.1) for 2, picked by hand. The norm grows with the square root of the
    latent's size (16384 entries there) and the cosine does not, so the weights mean what they meant only at that size.
    For v-prediction the code takes the cosine of raw outputs; here both terms are of e_hat, as the theory has it.

    Attributes:
        norm_weight: of the isotropic term.
        alignment_weight: of the anisotropic term.
        low_noise: the low timestep as a share of the training schedule, in [0, 1).
        at: the first step, pure noise.

    Raises:
        ValueError: `low_noise` outside [0, 1).
    """

    name: str = field(default="anisotropy", init=False)
    higher_is_memorized: bool = field(default=True, init=False)
    lanes: float = field(default=2.0, init=False)
    norm_weight: float = 1.0
    alignment_weight: float = 2.0
    low_noise: float = 0.041
    at: tuple[float, ...] | None = (0.0,)

    def __post_init__(self) -> None:
        """Refuse a timestep that the checkpoint does not have."""
        if not 0 <= self.low_noise < 1:
            raise ValueError(f"low_noise={self.low_noise} is no share of the schedule: give a number in [0, 1)")

    def measure(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,), from ``-alignment_weight``.

        Raises:
            ValueError: the sampler evaluated no control.
        """
        guidance = model.read(call, "conditional").e_hat - model.read(call, "control").e_hat
        return self.norm_weight * guidance.flatten(1).norm(dim=1) + self.alignment_weight * self.alignment(call, model)

    def alignment(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,) in [-1, 1]: the mean cosine between guidance and unconditional score at the low-noise timestep."""
        step = min(round(self.low_noise * len(model.alphas_cumprod)), len(model.alphas_cumprod) - 1)
        level = NoiseLevel.from_alpha_bar(float(model.alphas_cumprod[step]))
        x = torch.cat([call.x, call.x])
        output = evaluate_lanes(model.unet, x, torch.full((), step, device=x.device), call.lanes)
        control, conditional = interpret(output, x, level, model.prediction_type).e_hat.chunk(2)
        return cosine_similarity(control, conditional - control, dim=1).mean((1, 2))
