"""Sharpness of the log-density along the guidance (Jeon et al. 2025, ICML, arXiv 2412.04140): the metric of SAIL."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from sd_guard.noise import at_least_float32
from sd_guard.statistics.base import Denoiser, StepCall
from sd_guard.trace import FiniteDifference, JacobianProduct


@dataclass(frozen=True, slots=True, kw_only=True)
class HessianScoreNorm:
    """``|H_d s_d|``: ``s_d = s_c - s_u`` is the difference of the scores, ``H_d = H_c - H_u`` of their Jacobians.

    With ``score = -e_hat / s`` this is ``|(J_c - J_u)(e_c - e_u)| / s^2`` for the Jacobians J of the noise prediction,
    all at the UNet's input. Both Hessians are multiplied by the *same* vector, the difference of the scores; that, the
    first step and the scale are as in the authors' published code (Dongjae0324/sharpness_memorization_diffusion), where
    the product is exact forward mode. Its v-prediction branch scales the score otherwise; here every parametrisation
    goes through e_hat.

    Attributes:
        product: how Jacobian products are taken; a finite difference of the score along the score by default.
        at: the first step, pure noise.
    """

    name: str = field(default="hessian_score_norm", init=False)
    higher_is_memorized: bool = field(default=True, init=False)
    product: JacobianProduct = field(default_factory=FiniteDifference)
    at: tuple[float, ...] | None = (0.0,)

    @property
    def lanes(self) -> float:
        """One product in each of the two lanes; the unperturbed predictions are the sampler's own."""
        return 2.0 * self.product.evaluations

    def measure(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,), at least 0.

        Raises:
            ValueError: the sampler evaluated no control.
        """
        conditional, control = model.read(call, "conditional").e_hat, model.read(call, "control").e_hat
        direction = conditional - control
        moved = self.product(model.noise_function(call, "conditional"), call.x, direction, conditional)
        moved = moved - self.product(model.noise_function(call, "control"), call.x, direction, control)
        return at_least_float32(moved).flatten(1).norm(dim=1) / call.level.s**2
