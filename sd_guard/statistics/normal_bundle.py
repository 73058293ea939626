"""Dimension by the rank of scores around a point: the normal bundle (Stanczuk et al. 2022, arXiv 2212.12611)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sd_guard.noise import at_least_float32
from sd_guard.statistics.base import Denoiser, StepCall
from sd_guard.statistics.flipd_curve import conditional_lanes, predict_at
from sd_guard.trace import RowSeeds, draw_probes


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalBundleLid:
    """D less the rank of K scores taken around the predicted image, told by the largest gap of their singular values.

    Close to a manifold the score points back to it, so that scores at noised copies of one of its points span the
    normal space (algorithm 1 of Stanczuk et al. 2022, arXiv 2212.12611). e_hat stands for the score: they differ by a
    factor. The point is ``a x0_hat`` with the prompt, and the noise that of one low level. Unlike there, the process
    keeps its variance (the paper's lets it grow), and a zero ends the list of singular values, so that a single
    point's full rank can be seen.

    The paper takes K = 4 D. K scores have no more than K singular values: below D, a rank above K reads as K, and the
    result is at least ``D - K``. Stable Diffusion's 16,384 dimensions are therefore out of a guard's reach; the default
    is twice the 256 of the reference checkpoints.

    It needs a network that resolves its manifold. That of the first reference does not: behind a first singular
    value, of an offset that all scores share, the others fall without a gap, and nearly every image reads ``D - 1``.

    Attributes:
        perturbations: K.
        timestep: training timestep of the level: low, so that the noise stays in reach of the manifold.
        at: the last step, where the prediction is the image.

    Raises:
        ValueError: fewer than two perturbations.
    """

    name: str = field(default="normal_bundle_lid", init=False)
    higher_is_memorized: bool = field(default=False, init=False)
    perturbations: int = 512
    timestep: int = 10
    at: tuple[float, ...] | None = (1.0,)

    def __post_init__(self) -> None:
        """Refuse a list of singular values without a gap."""
        if self.perturbations < 2:
            raise ValueError(f"perturbations={self.perturbations} shows no gap: give at least 2, better above D")

    @property
    def lanes(self) -> float:
        """One for each perturbation."""
        return float(self.perturbations)

    def measure(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,) whole numbers from ``max(0, D - K)`` to D - 1; NaN where a score is not finite.

        Raises:
            ValueError: a timestep outside the schedule, or as many seeds as images are not at hand.
        """
        level, predict = predict_at(model, self.timestep, conditional_lanes(call))
        clean, seeds = model.read(call, "conditional").x0_hat, RowSeeds(model.seeds, call.step)
        scores: list[Tensor] = []
        for k in range(self.perturbations):
            noise = draw_probes(clean.shape, seeds, "gaussian", clean.device, k).to(clean.dtype)
            x = (level.a * clean + level.s * noise).to(call.x.dtype)
            scores.append(at_least_float32(predict(x)).flatten(1))
        return torch.stack([call.x[0].numel() - rank_by_gap(row) for row in torch.stack(scores, dim=1)])


def rank_by_gap(vectors: Tensor) -> Tensor:
    """Number of singular values above the largest gap between neighbours, a last one of zero included.

    Args:
        vectors: (K, D).

    Returns:
        Scalar from 1 to min(K, D) in the dtype of `vectors`; NaN where an entry is not finite.
    """
    if not vectors.isfinite().all():
        return vectors.new_tensor(torch.nan)
    values = torch.linalg.svdvals(vectors)
    gaps = -torch.cat([values, values.new_zeros(1)]).diff()
    return (gaps.argmax() + 1).to(vectors.dtype)
