"""Does another seed show what the prompt brings along?

A memorized prompt has one picture, whatever noise it starts from; an ordinary one has another for each. Carlini et al.
(2023, arXiv 2301.13188) compare finished images, Webster (2023, arXiv 2305.08694) and Hintersdorf et al. (2024, arXiv
2406.02366) what a first step says. Here an image on its way is held against what the model predicts, with the same
prompt, from noise that it has not seen, at a level where ordinary pictures have little in common any more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import torch
from torch import Tensor

from sd_guard.lanes import Conditioning, evaluate_lanes
from sd_guard.noise import CLEAR_SIGMA, NoiseLevel, Prediction, interpret, nearest_level
from sd_guard.statistics.base import Denoiser, StepCall
from sd_guard.statistics.sharpness import persistence
from sd_guard.transfers import send

# Where the other seed is looked at, as sigma = s / a. Chosen on `tune` rows of six reference checkpoints, where 3 and 7
# did hardly worse.
SEEN_SIGMA: Final = 5.0
OTHER_SEED_LANES: Final = 2
# What ordinary pictures agree by at most, nearly all: more from a noise level on where the prediction is little but the
# mean of what the prompt can mean, which is no seed's own. Chosen on `tune` rows of the same six. Where linear betas
# begin, at 157, it is that mean, and more noise makes it no more so; zero terminal SNR begins without a signal.
_ORDINARY, _ORDINARY_A_FOLD, _ORDINARY_UP_TO = 0.5, 0.1, 10.0
_HIGHEST_SIGMA: Final = 150.0


class OtherPlaces(NamedTuple):
    """Training timestep and noise level where another seed begins, and where it is looked at."""

    first: tuple[int, NoiseLevel]
    seen: tuple[int, NoiseLevel]


def other_places(alphas_cumprod: Tensor) -> OtherPlaces:
    """From the highest level whose prediction says anything, down to `SEEN_SIGMA`; no sampler is asked."""
    return OtherPlaces(nearest_level(alphas_cumprod, CLEAR_SIGMA), nearest_level(alphas_cumprod, SEEN_SIGMA))


def other_noise(seeds: Sequence[int], like: Tensor, number: int = 0) -> Tensor:
    """(N, C, H, W) Gaussian, of shape, dtype and device of `like`; depends on each seed and `number` only."""
    keys = [(seed + 0xD1B54A32D192ED03 * (number + 1)) % 2**63 for seed in seeds]  # far from the seed's other uses
    noise = [torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(key), device="cpu") for key in keys]
    return send(torch.stack(noise).to(like.dtype), like.device)


def step_down(ahead: Prediction, level: NoiseLevel) -> Tensor:
    """A deterministic step (DDIM; Song et al. 2020, arXiv 2010.02502) to a lower noise level."""
    return level.a * ahead.x0_hat + level.s * ahead.e_hat


def predict_from_other_seed(
    model: Denoiser, lanes: Conditioning, like: Tensor, seeds: Sequence[int], number: int = 0
) -> Tensor:
    """What the model predicts for the same prompts from other noise: two lanes an image, no guidance.

    A single step leads from the first place to the second: at these levels that loses nothing against a fine schedule.

    Args:
        model: behind the trajectory.
        lanes: of N prompts.
        like: (N, C, H, W) whose shape, dtype and device the noise has.
        seeds: N, in [0, 2^64).
        number: which of several.

    Returns:
        (N, C, H, W) predicted clean latents, float32 or better.
    """

    def predict(x: Tensor, place: tuple[int, NoiseLevel]) -> Prediction:
        timestep, level = place
        own = torch.full((), timestep, device=x.device, dtype=model.timestep_dtype)
        output = evaluate_lanes(model.unet, x, own, lanes)
        return interpret(output, x, level, model.prediction_type)

    places = other_places(model.alphas_cumprod)
    ahead = predict(other_noise(seeds, like, number), places.first)
    return predict(step_down(ahead, places.seen[1]).to(like), places.seen).x0_hat


def seed_agreement(x0_hat: Tensor, x0_hat_control: Tensor, other: Tensor) -> Tensor:
    """How much of what the prompt adds to a predicted image another seed shows in the same places.

    Window by window, as `persistence` has it, so that a template counts whose remainder is free. Of the difference to
    the control, since what this noise shows without the prompt is the seed's own.

    Args:
        x0_hat: (B, C, H, W) conditional prediction.
        x0_hat_control: (B, C, H, W) the unconditional one at the same latent.
        other: (B, C, H, W) conditional prediction from other noise.

    Returns:
        (B,) float32 or better in [-1, 1]; 0.5 and more for memorized pictures, less for most others.
    """
    return persistence(x0_hat.float() - x0_hat_control.float(), other)


def excess_agreement(x0_hat: Tensor, x0_hat_control: Tensor, other: Tensor, level: NoiseLevel) -> Tensor:
    """`seed_agreement` above what is ordinary for a prediction at `level`.

    Returns:
        (B,) float32 or better in [-2, 1]; positive for memorized pictures.
    """
    folds = math.log(max(min(level.sigma, _HIGHEST_SIGMA) / _ORDINARY_UP_TO, 1.0))
    return seed_agreement(x0_hat, x0_hat_control, other) - (_ORDINARY + _ORDINARY_A_FOLD * folds)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedAgreement:
    """`seed_agreement` with one other seed.

    Attributes:
        at: anywhere.
    """

    name: str = field(default="seed_agreement", init=False)
    higher_is_memorized: bool = field(default=True, init=False)
    lanes: float = field(default=float(OTHER_SEED_LANES), init=False)
    at: tuple[float, ...] | None = None

    def measure(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,).

        Raises:
            ValueError: the sampler evaluated no control.
        """
        images = call.x.shape[0]
        prompts = call.lanes.select(torch.arange(images, device=call.x.device) + images)
        other = predict_from_other_seed(model, prompts, call.x, model.seeds)
        return seed_agreement(model.read(call, "conditional").x0_hat, model.read(call, "control").x0_hat, other)
