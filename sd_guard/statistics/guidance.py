"""Statistics of classifier-free guidance: how far the text moves the prediction."""

from __future__ import annotations

from torch import Tensor


def cfg_norm(e_conditional: Tensor, e_unconditional: Tensor) -> Tensor:
    """|e_c - e_u| of Wen et al. (2024, ICLR, "Detecting, explaining, and mitigating memorization"), per image.

    Args:
        e_conditional: (B, C, H, W) noise prediction with the prompt.
        e_unconditional: (B, C, H, W) noise prediction without it, at the same latent.

    Returns:
        (B,) Euclidean norms; larger is more memorized, early in the trajectory only.
    """
    return (e_conditional.float() - e_unconditional.float()).flatten(1).norm(dim=1)
