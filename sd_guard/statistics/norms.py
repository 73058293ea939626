"""The length of the predicted noise."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from sd_guard.statistics.base import Denoiser, StepCall


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseNorm:
    """``|e_hat|`` with the prompt: the score's length times s, about sqrt(D - LID) at the noisy latent.

    The fewer directions are open, the more of the noise a model can see, which ties the length of scores to the
    geometry of Ross et al. (2024, arXiv 2411.00113). It says what `SteinLid` says, on another scale.

    Attributes:
        at: the last step, where it was seen to tell memories on the reference checkpoint.
    """

    name: str = field(default="noise_norm", init=False)
    higher_is_memorized: bool = field(default=True, init=False)
    lanes: float = field(default=0.0, init=False)
    at: tuple[float, ...] | None = (1.0,)

    def measure(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,), at least 0; about sqrt(D) at most."""
        return model.read(call, "conditional").e_hat.flatten(1).norm(dim=1)
