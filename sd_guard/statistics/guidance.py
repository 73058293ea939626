"""Statistics of classifier-free guidance: how far the text moves the prediction."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from sd_guard.statistics.base import Denoiser, StepCall


def cfg_norm(e_conditional: Tensor, e_unconditional: Tensor) -> Tensor:
    """|e_c - e_u| of Wen et al. (2024, ICLR, "Detecting, explaining, and mitigating memorization"), per image.

    Args:
        e_conditional: (B, C, H, W) noise prediction with the prompt.
        e_unconditional: (B, C, H, W) noise prediction without it, at the same latent.

    Returns:
        (B,) Euclidean norms; larger is more memorized, early in the trajectory only.
    """
    return (e_conditional.float() - e_unconditional.float()).flatten(1).norm(dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CfgNorm:
    """`cfg_norm` of one step. Wen et al. look at the first step, or average over several; here each step is by itself.

    Attributes:
        at: anywhere.
    """

    name: str = field(default="cfg_norm", init=False)
    higher_is_memorized: bool = field(default=True, init=False)
    lanes: float = field(default=0.0, init=False)
    at: tuple[float, ...] | None = None

    def measure(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,), at least 0.

        Raises:
            ValueError: the sampler evaluated no control.
        """
        return cfg_norm(model.read(call, "conditional").e_hat, model.read(call, "control").e_hat)
