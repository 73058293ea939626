"""How well the model predicts noise that is added to its own prediction: its training loss at one image."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sd_guard.noise import at_least_float32
from sd_guard.statistics.base import Denoiser, StepCall
from sd_guard.statistics.flipd_curve import conditional_lanes, predict_at
from sd_guard.trace import RowSeeds, draw_probes


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconstructionCost:
    """``mean |e_hat(a x0_hat + s e) - e|^2 / D`` with the prompt, e being fresh Gaussian noise at a level of its own.

    The loss of Ho et al. (2020, arXiv 2006.11239, eq. 14) at the predicted image, up to ``(a / s)^2`` the squared
    distance of its reconstruction. A model that knows the image knows which part of the latent is noise.

    Attributes:
        timestep: training timestep of the level. The default told memories best on a few prompts of the first
            reference.
        draws: noises, each a lane; an image's own, from its seed and the step.
        at: anywhere.

    Raises:
        ValueError: no draws.
    """

    name: str = field(default="reconstruction_cost", init=False)
    higher_is_memorized: bool = field(default=False, init=False)
    timestep: int = 500
    draws: int = 2
    at: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse an empty mean."""
        if self.draws < 1:
            raise ValueError(f"draws={self.draws} measures nothing: give at least 1")

    @property
    def lanes(self) -> float:
        """One for each noise."""
        return float(self.draws)

    def measure(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,), at least 0; about 1 where the model says that there is no noise.

        Raises:
            ValueError: a timestep outside the schedule, or as many seeds as images are not at hand.
        """
        level, predict = predict_at(model, self.timestep, conditional_lanes(call))
        clean, seeds = model.read(call, "conditional").x0_hat, RowSeeds(model.seeds, call.step)
        costs: list[Tensor] = []
        for draw in range(self.draws):
            noise = draw_probes(clean.shape, seeds, "gaussian", clean.device, draw).to(clean.dtype)
            e_hat = at_least_float32(predict((level.a * clean + level.s * noise).to(call.x.dtype)))
            costs.append((e_hat - noise).flatten(1).square().mean(1))
        return torch.stack(costs).mean(0)
