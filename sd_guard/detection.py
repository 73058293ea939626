"""From the observations of a trajectory to one score an image, and from a score to a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from sd_guard.observation import Observation

Verdict = Literal["pass", "flag", "unscored"]


class Detector(Protocol):
    """Scores a trajectory; higher is more memorized. A verdict depends on no other image of the batch."""

    @property
    def threshold(self) -> float:
        """Scores above it are flagged."""
        ...

    def score(self, observations: Sequence[Observation]) -> Tensor:
        """(B,) scores from the observations of the probed steps, in their order."""
        ...


def verdict_of(score: float, threshold: float) -> Verdict:
    """`unscored` for a score that is not finite: what could not be measured is never a pass."""
    if not math.isfinite(score):
        return "unscored"
    return "flag" if score > threshold else "pass"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrematureDetail:
    """The default: premature detail of the posterior mean, together with the width that the posterior has left.

    Both halves are relative to the model's own unconditional prediction at the same latent, so that the threshold
    needs no calibration: `mean over steps of log(detail_c / detail_u) + lid_weight * mean of (LID_u - LID_c) / D`. The
    numbers were chosen on `tune` rows of the bundled reference checkpoint.

    Attributes:
        threshold: scores above it are flagged.
        lid_weight: weight of the LID deficit, a share of the latent dimension.
    """

    threshold: float = 0.55
    lid_weight: float = 15.0

    def score(self, observations: Sequence[Observation]) -> Tensor:
        """(B,) scores."""
        ratio = torch.stack([seen.values["log_detail_ratio"] for seen in observations]).mean(0)
        deficits = [
            (seen.values["trajectory_lid_control"] - seen.values["trajectory_lid"]) / seen.dimension
            for seen in observations
            if "trajectory_lid" in seen.values
        ]
        return ratio + self.lid_weight * torch.stack(deficits).mean(0) if deficits else ratio


DETECTORS: dict[str, type[Detector]] = {"premature_detail": PrematureDetail}
