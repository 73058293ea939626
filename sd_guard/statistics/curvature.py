"""Where the prompt pins the image more than no prompt does ("mem-curv-diff").

Kim and Lee (2026, ICML, arXiv 2605.26756).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sd_guard.statistics.base import Denoiser, StepCall
from sd_guard.trace import FiniteDifference, JacobianProduct, RowSeeds, draw_probes


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvatureDifference:
    """Mean over places of the positive part of ``sum_channels diag(J_c - J_u)``.

    J is the Jacobian of the noise prediction; ``diag(J) / s`` is the curvature of ``-log p`` coordinate by
    coordinate (eq. 1, the baseline being the same model without a prompt), estimated by Hutchinson's ``v * (J v)``
    with Rademacher vectors. As in the authors' code (Gwangho99/mem-curv-diff) the factor ``1 / s`` is left out,
    channels are added before the positive part is taken, 16 vectors are used at the last of 50 steps, and an
    image's score is the mean of its map. They take ``v * (J^T v)`` by reverse mode, which has the same mean. Of the
    estimate's noise, too, only the positive part is kept: few probes raise the value of every image, most where the
    Jacobian is large off its diagonal.

    Attributes:
        probes: random vectors, shared by the two lanes; each image has its own, from its seed and the step.
        product: how Jacobian products are taken.
        at: the last step.

    Raises:
        ValueError: no probes.
    """

    name: str = field(default="curvature_difference", init=False)
    higher_is_memorized: bool = field(default=True, init=False)
    probes: int = 16
    product: JacobianProduct = field(default_factory=FiniteDifference)
    at: tuple[float, ...] | None = (1.0,)

    def __post_init__(self) -> None:
        """Refuse an empty estimate."""
        if self.probes < 1:
            raise ValueError(f"probes={self.probes} measures nothing: give at least 1")

    @property
    def lanes(self) -> float:
        """A product for each probe in each of the two lanes."""
        return 2.0 * self.probes * self.product.evaluations

    def places(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B, H, W), at least 0: the map, high where the prompt pins the image.

        Raises:
            ValueError: the sampler evaluated no control, or as many seeds as images are not at hand.
        """
        conditional, control = model.read(call, "conditional").e_hat, model.read(call, "control").e_hat
        with_prompt, without = model.noise_function(call, "conditional"), model.noise_function(call, "control")
        total = torch.zeros_like(conditional[:, 0])
        for probe in range(self.probes):
            v = draw_probes(call.x.shape, RowSeeds(model.seeds, call.step), "rademacher", call.x.device, probe)
            difference = self.product(with_prompt, call.x, v, conditional) - self.product(without, call.x, v, control)
            total += (v * difference).sum(1)
        return (total / self.probes).relu()

    def measure(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,), at least 0; the mean of `places`."""
        return self.places(call, model).mean((1, 2))
