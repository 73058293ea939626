"""How far one sampling step moves the latent ("Broken Memories", Huang et al. 2026, arXiv 2605.22050)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from sd_guard.noise import at_least_float32
from sd_guard.statistics.base import Denoiser, StepCall


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentUpdateNorm:
    """``|z_{i+1} - z_i|``, the Euclidean length of the sampler's step, in its own latents' units.

    Guidance is part of the step, so its scale is part of the number; so is the scheduler (one that walks sigmas holds
    latents of another size): compare only under one configuration.

    The paper names the norm of latent updates and watches it at every step against what ordinary prompts reach there.
    Its text beyond the abstract was not at hand: whether it divides by the latent's size or by the step of the
    schedule is not known here, and neither changes a ranking within one step of one configuration.

    Attributes:
        at: anywhere.
    """

    name: str = field(default="latent_update_norm", init=False)
    higher_is_memorized: bool = field(default=True, init=False)
    lanes: float = field(default=0.0, init=False)
    at: tuple[float, ...] | None = None

    def measure(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,), at least 0; `model` is not asked.

        Raises:
            ValueError: the latents around the step are not at hand.
        """
        if call.latents is None or call.next_latents is None:
            raise ValueError("latents and next_latents are None: LatentUpdateNorm needs a trajectory that keeps them")
        update = at_least_float32(call.next_latents) - at_least_float32(call.latents)
        return update.flatten(1).norm(dim=1)
